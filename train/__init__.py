"""A small training room: puts the blocks into a ResNet and trains it on images."""
