"""Box-supervised instance segmentation (MISA, IJCAI-24).

first steps:
  misa doctor                                    is all there that it needs?
  misa train demo:box --work-dir runs/demo       train on drawn scenes, minutes on one CPU core
  misa predict runs/demo photo.jpg --out found   the masks that it finds in an image
  misa check mydata                              your own images and boxes: what is wrong with them?
"""
