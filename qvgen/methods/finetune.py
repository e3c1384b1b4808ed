"""finetune: the full-precision model trained for the same steps on the same clips, then quantized as `mse` does.

Is the gain of quantization-aware training just training? Loss: |model - target|^2. Nothing is quantized while it trains; the
grids are searched afterwards on the tuned model's own inputs, with the settings of stage calibrate.
"""

from qvgen.methods.method import Method

METHOD = Method(name="finetune", loss="target", quantized=False)
