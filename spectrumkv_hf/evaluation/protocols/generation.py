"""`evaluate`'s evaluator of generated text, over caches. Importing it needs the package `evaluate`."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from evaluate import TextGenerationEvaluator
from transformers import Pipeline, PreTrainedModel, pipeline
from transformers.cache_utils import Cache

from spectrumkv_hf.support.calls import cache_argument


class CacheTextGenerationEvaluator(TextGenerationEvaluator):
    """Generates over a fresh cache for each batch, and computes a metric of the answers, without their prompts.

    Besides, it takes pipelines on Transformers 5, where `evaluate.evaluator("text-generation")` fails as it looks for
    `TFPreTrainedModel`; and where a column of labels is named, the metric gets `predictions` and `references`, else
    `data`, as the stock one's.

    Args:
        cache: Makes an empty cache, such as `lambda: DynamicCache(config=model.config)`. It is called for every batch,
            since a cache holds the tokens of one batch.
        batch_size: Prompts at once; with 2 or more the tokenizer has to pad on the left.
        generation_kwargs: Of the pipeline's call, and so of `generate()`: `{"max_new_tokens": 32, "do_sample": False}`.

    Raises:
        ValueError: a batch size below 1.
        ImportError: scipy is missing, which `evaluate`'s evaluators need.
    """

    def __init__(
        self, cache: Callable[[], Cache], batch_size: int = 1, generation_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        super().__init__()
        self.cache, self.batch_size = cache, batch_size
        self.generation_kwargs = dict(generation_kwargs or {})

    def compute(self, *args: Any, label_column: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """As of `evaluate.Evaluator`: `compute(model_or_pipeline, data, metric=..., tokenizer=...)`.

        Args:
            args: As there.
            label_column: Of `data`, the metric's references; None: the metric takes the texts alone, as `data`.
            kwargs: As there.

        Returns:
            The metric's results, and the evaluator's times.

        Raises:
            ValueError: there is no metric, no model, no such column, or the tokenizer pads on the right.
        """
        results: dict[str, Any] = super().compute(*args, label_column=label_column, **kwargs)
        return results

    def prepare_data(
        self, data: Dataset, input_column: str, label_column: str | None = None, *_: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """The references, if any, and the prompts."""
        columns = {"input_column": input_column}
        if label_column is not None:
            columns["label_column"] = label_column
        self.check_required_columns(data, columns)
        references = {} if label_column is None else {"references": data[label_column][:]}
        return references, data[input_column][:]

    def prepare_pipeline(
        self,
        model_or_pipeline: Any,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        device: Any = None,
    ) -> Pipeline:
        """The pipeline, or one of a model or of the name of one; a model stays where it is unless a device is given."""
        if isinstance(model_or_pipeline, Pipeline):
            pipe = model_or_pipeline
        elif isinstance(model_or_pipeline, str | PreTrainedModel):
            where = {} if device is None else {"device": device}
            if not where and isinstance(model_or_pipeline, PreTrainedModel) and not _spread(model_or_pipeline):
                where = {"device": model_or_pipeline.device}
            pipe = pipeline(self.task, model=model_or_pipeline, tokenizer=tokenizer, **where)
        else:
            raise ValueError(
                f"model_or_pipeline is a model, its name or a pipeline, got {type(model_or_pipeline).__name__}"
            )
        if pipe.task != self.task:
            raise ValueError(f"the pipeline is one for {self.task}, got one for {pipe.task}")
        if self.batch_size > 1 and pipe.tokenizer.padding_side != "left":
            raise ValueError("batches of prompts are padded on the left: set tokenizer.padding_side = 'left'")
        return pipe

    def call_pipeline(self, pipe: Pipeline, prompts: list[str]) -> tuple[list[Any], dict[str, float]]:
        """What the pipeline makes of every prompt, and how long it took."""

        def answers(inputs: list[str]) -> list[Any]:
            made = []
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size]
                options = {"return_full_text": False, **self.generation_kwargs, **cache_argument(self.cache())}
                made += pipe(batch, batch_size=len(batch), **options)
            return made

        found: tuple[list[Any], dict[str, float]] = super().call_pipeline(answers, prompts)
        return found

    def compute_metric(self, metric: Any, metric_inputs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Of the texts, as predictions where there are references."""
        if "references" in metric_inputs:
            metric_inputs = {"predictions": metric_inputs["data"], "references": metric_inputs["references"]}
        results: dict[str, Any] = super().compute_metric(metric, metric_inputs, *args, **kwargs)
        return results


def _spread(model: PreTrainedModel) -> bool:
    """Whether accelerate put the model on its devices, where a pipeline may not move it."""
    return getattr(model, "hf_device_map", None) is not None
