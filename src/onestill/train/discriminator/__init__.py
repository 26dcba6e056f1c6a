"""ADD's discriminator: frozen feature networks, what they look at, and the heads that are trained."""
