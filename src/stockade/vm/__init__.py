"""User-Mode Linux machines: images, boot, control, network, snapshots, and what to do after a break-in."""
