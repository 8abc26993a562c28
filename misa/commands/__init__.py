"""Box-supervised instance segmentation (MISA, IJCAI-24).

first steps:
  misa doctor                                               check the installation
  misa train demo:long                                      train on synthetic scenes, minutes on one CPU core
  misa predict runs/demo-long-seed0 photo.jpg --out found   predict the masks of an image
  misa check mydata                                         check your own images and boxes
"""
