"""The loop over layers that layer-wise techniques share."""
