"""Networks: the recognizer and its parts."""

from satrn.models.encoder import EncoderOutput
from satrn.models.satrn import SATRN

__all__ = ["SATRN", "EncoderOutput"]
