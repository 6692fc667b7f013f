"""Camera frames -> the model's pixels -> the bytes that travel.

In: uint8[H, W, 3] frames and a model's folder. Out: encoded images on the loader's side, uint8 pixels on the trainer's side. Read
`spec` (what one model needs), `families` (model folder -> spec) with `openvla` and `padding` (to a square), `views` (crops of a
frame), `geometry` and `resize`, `augment`, then `transport` (resize, JPEG and Base64, and back) and `transport_cost` (what each
transport costs on this host).
"""
