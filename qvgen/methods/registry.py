"""The methods that params.yaml can name, each a card in a file of its own, which says what it is and where it deviates."""

from __future__ import annotations

from qvgen.methods import dsa, efficientdm, finetune, kd, lsq, mse, qdm, qvgen, qvgen_plus, rtn, svdquant, viditq
from qvgen.methods.method import Method

CARDS = (rtn, mse, lsq, efficientdm, kd, finetune, qvgen, dsa, qvgen_plus, svdquant, viditq, qdm)

METHODS: dict[str, Method] = {card.METHOD.name: card.METHOD for card in CARDS}
