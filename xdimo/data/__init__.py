"""Videos to clips: manifest, exact decoding, VAE, latents."""
