"""Pure tensor functions: no models, files, logging or AIMET."""
