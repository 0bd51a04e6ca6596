"""What is trained on: data sets, augmentation, feeding the devices."""
