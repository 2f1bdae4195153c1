"""Stage 2: readout → sketch → RISE → calibration → index → search, and the rivals behind the same interface.

Shape suffixes of tensor names: T token positions of a batch, V vocabulary, d hidden size, C candidates of a position,
R, H, G, M sketch widths (K_r, K_h, K_g, K_m), N documents, Q queries, D signature dimension K_h (K_r + K_g) + K_m.
"""
