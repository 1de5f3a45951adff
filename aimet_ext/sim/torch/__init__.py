"""The adaptor to aimet_torch."""
