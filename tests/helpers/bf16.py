"""Whether OpenVINO computes bf16 graphs on this machine."""

from scm_sdk._util.lazy import is_installed
from scm_sdk._util.processor import BF16_CLASSES, cpu_class

COMPUTES_BF16 = cpu_class() in BF16_CLASSES and is_installed("openvino")
