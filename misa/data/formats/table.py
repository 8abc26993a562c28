"""The table of annotation formats, in the order in which they are tried."""

from misa.data.formats.coco_json import COCO
from misa.data.formats.csv_boxes import CSV
from misa.data.formats.labelme import LABELME
from misa.data.formats.parts import Format
from misa.data.formats.voc_xml import VOC
from misa.data.formats.yolo import YOLO

FORMATS: dict[str, Format] = {"coco": COCO, "yolo": YOLO, "voc": VOC, "labelme": LABELME, "csv": CSV}
