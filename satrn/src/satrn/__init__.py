"""SATRN: recognition of text of arbitrary shape with two-dimensional self-attention (Lee et al., 2020)."""

from satrn.config import CHARSET_94, SATRNConfig, preset
