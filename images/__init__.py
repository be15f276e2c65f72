"""Building the guest's root image, and images for the demo."""
