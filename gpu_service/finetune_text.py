"""A fine-tune of a model that writes: rows become tokens, and what the frozen layers put out may be kept.

What happens in which order is finetune.py's.
"""

import asyncio
from functools import partial

from gpu_service import costs, learn_text, samples
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.finetune import Data, FineTune, beside
from gpu_service.layers import Selection
from gpu_service.models import Source
from gpu_service.plan import Plan
from gpu_service.prefix import Chosen
from gpu_service.reporter import Reporter


class TextTune(FineTune[Source, TokenStore]):
    def _source(self) -> Source:
        return self._models.source(self._spec.base_model)

    async def _fetch(self, source: Source, reporter: Reporter) -> Data[TokenStore]:
        spec = self._spec
        length = plans.max_length(spec.hyperparameters.max_length_tokens, source)
        train_on = plans.train_on(spec.hyperparameters)
        refs = [ref for ref in (spec.training_file, spec.validation_file) if ref]
        with self._cache.keep(*(ref.sha256 for ref in refs)):
            paths = [await self._fetched(ref) for ref in refs]
            stores = []
            for ref, path, name in zip(refs, paths, ("training_file", "validation_file"), strict=False):
                build = partial(TokenStore.build, path, self._folder / name, source.tokenizer, length)
                build = partial(build, name=ref.name, param=name, train_on=train_on)
                say = partial(lambda name, rows: reporter.say(f"{rows:,} rows of {name} are tokens now."), ref.name)
                stores.append(await beside(build, say))
            files = [samples.File(path, ref.name) for ref, path in zip(refs, paths, strict=True)]
            prompts = await asyncio.to_thread(
                samples.prompts, source, spec.sample_prompts, files[0], files[1] if len(files) > 1 else None
            )
        return Data(stores[0], stores[1] if len(stores) > 1 else None, prompts, await self._begin(source))

    def _plan(self, source: Source, selection: Selection, data: Data[TokenStore]) -> Plan:
        wanted = self._spec.hyperparameters
        return plans.resolve(
            wanted,
            source,
            selection,
            data.store,
            plans.max_length(wanted.max_length_tokens, source),
            self._device,
            seed=self._spec.seed,
            samples=bool(self._spec.sample_prompts),
            validates=data.validation is not None,
            fits=self._models.fits(source.id, selection.quantize),
        )

    def _job(self, source: Source, selection: Selection, plan: Plan, data: Data[TokenStore]) -> learn_text.TextJob:
        prompts = tuple(data.prompts)
        return learn_text.TextJob(
            source, selection, plan, data.store, data.validation, self._spec.seed, prompts, data.begin
        )

    def _cost(self, source: Source, selection: Selection, data: Data[TokenStore], plan: Plan) -> costs.Estimate:
        return source.cost(
            selection,
            plan.micro_rows,
            data.store.report.longest,
            self._device.precision.dtype.itemsize,
            checkpointing=plan.activation_checkpointing,
            moments_bytes_per_param=plans.MOMENTS_BYTES[plan.optimizer],
            keeps_best=plan.early_stop_patience > 0,
            streamed=plan.stream_layers,
        )

    def _estimated_s(self, source: Source, selection: Selection, data: Data[TokenStore], plan: Plan) -> float:
        per_s, seen = self._worker.flops_per_s(source.id), int(data.store.lengths.sum())
        if not per_s:
            return 0.0
        flops = costs.training_flops(selection, source.tensors, tied=source.tied)
        on_disk = costs.prefix_bytes(selection, source.shape, seen, self._device.precision.dtype.itemsize)
        return costs.training_time(flops, seen, plan.n_epochs, per_s, on_disk, plan.prefix_cache).seconds

    def _say_chosen(self, reporter: Reporter, choice: Chosen, plan: Plan, *, goes_on: bool) -> None:
        what = "is kept on disk" if choice.cached else "is computed in every step"
        reporter.say(f"What the frozen layers put out {what}: {choice.why}.", data={"prefix_cache": choice.cached})
        if goes_on and choice.cached is not plan.prefix_cache:
            reporter.say("It was otherwise before the checkpoint: results agree but for rounding.", level="warn")
