"""A checkpoint's parts as torch modules, one file each: text encoder, denoiser, latents and so on. Needs `[torch]`."""
