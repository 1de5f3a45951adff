"""The loop over decoder blocks that block-wise techniques share."""
