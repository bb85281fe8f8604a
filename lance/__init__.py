"""LANCE: multi-way rejection distributions, textual gradients, and refined prompts in place of rigid refusals."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lance.chat import ChatModel, EndpointChat, LocalChat, load_chat
    from lance.corpus import DataWarning, Prompt, Span, load_corpus, read_prompts, write_prompts
    from lance.distribution import RejectionDistribution
    from lance.encoder import PromptEncoder
    from lance.enhancer import VariationalEnhancer
    from lance.errors import ChatError, DataError, LanceError, ModelError, TaxonomyError
    from lance.fitting import EnhancerConfig
    from lance.gradients import GradientBuilder, GradientConfig, GradientSpan, MultiWayGradient, TextualGradient
    from lance.label_enhancement import LabelEnhancer
    from lance.objective import ObjectiveWeights
    from lance.pipeline import Analysis, Lance, Reply
    from lance.refiner import Refinement, Refiner, RefinerConfig, Step
    from lance.taxonomy import Category, Taxonomy
    from lance.verifier import Verifier

__version__ = "0.1.0"

# Name -> module. Modules load when a name is first used, so that `lance --help` and small imports do not wait for torch.
_PUBLIC = {
    "chat": ["ChatModel", "EndpointChat", "LocalChat", "load_chat"],
    "corpus": ["DataWarning", "Prompt", "Span", "load_corpus", "read_prompts", "write_prompts"],
    "distribution": ["RejectionDistribution"],
    "encoder": ["PromptEncoder"],
    "enhancer": ["EnhancerConfig", "VariationalEnhancer"],
    "errors": ["ChatError", "DataError", "LanceError", "ModelError", "TaxonomyError"],
    "gradients": ["GradientBuilder", "GradientConfig", "GradientSpan", "MultiWayGradient", "TextualGradient"],
    "label_enhancement": ["LabelEnhancer"],
    "objective": ["ObjectiveWeights"],
    "pipeline": ["Analysis", "Lance", "Reply"],
    "refiner": ["Refinement", "Refiner", "RefinerConfig", "Step"],
    "taxonomy": ["Category", "Taxonomy"],
    "verifier": ["Verifier"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [
    "Analysis", "Category", "ChatError", "ChatModel", "DataError", "DataWarning", "EndpointChat", "EnhancerConfig", "GradientBuilder",
    "GradientConfig", "GradientSpan", "LabelEnhancer", "Lance", "LanceError", "LocalChat", "ModelError", "MultiWayGradient", "ObjectiveWeights", "Prompt",
    "PromptEncoder", "Refinement", "Refiner", "RefinerConfig", "RejectionDistribution", "Reply", "Span", "Step", "Taxonomy", "TaxonomyError",
    "TextualGradient", "VariationalEnhancer", "Verifier", "__version__", "load_chat", "load_corpus", "read_prompts", "write_prompts",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"lance.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'lance' has no attribute {name!r}; its names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
