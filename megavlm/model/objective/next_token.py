"""Predict the next token of answers."""

from __future__ import annotations

from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.fusion import place_features
from megavlm.model.objective.objective import Objective


class NextToken(Objective):
    """Cross-entropy of the next token; image features take the place of their placeholders."""

    def enter(self, embeddings: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """See ``Objective``."""
        return place_features(embeddings, features, batch)
