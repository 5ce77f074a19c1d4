"""A fine-tune of a model that makes pictures: a zip becomes pixels, and latents and texts are computed once.

What happens in which order is finetune.py's.
"""

import asyncio
from functools import partial

from gpu_service import costs
from gpu_service import plan as plans
from gpu_service.errors import BadRequest
from gpu_service.finetune import Data, FineTune, beside
from gpu_service.layers import Selection
from gpu_service.learn_pictures import PictureJob
from gpu_service.picture_data import PictureStore
from gpu_service.plan import Plan
from gpu_service.prefix import Chosen
from gpu_service.reporter import Reporter
from gpu_service.samples import Prompt
from gpu_service.sd import PictureSource

SAMPLED = 3  # captions that are drawn where the user gave no prompts


class PictureTune(FineTune[PictureSource, PictureStore]):
    def _source(self) -> PictureSource:
        return self._models.picture_source(self._spec.base_model)

    async def _fetch(self, source: PictureSource, reporter: Reporter) -> Data[PictureStore]:
        spec, stores = self._spec, list[PictureStore]()
        side = plans.resolution(spec.hyperparameters.resolution, source)
        for text in (spec.concept.prompt, spec.concept.class_prompt or "") if spec.concept else ():
            await asyncio.to_thread(source.chunks, text, params=("concept",))
        refs = [ref for ref in (spec.training_file, spec.validation_file) if ref]
        with self._cache.keep(*(ref.sha256 for ref in refs)):
            for ref, name in zip(refs, ("training_file", "validation_file"), strict=False):
                path = await self._fetched(ref)
                build = partial(PictureStore.build, path, self._folder / name, source, side)
                build = partial(build, concept=spec.concept, param=name)
                say = partial(lambda name, rows: reporter.say(f"{rows:,} pictures of {name} are read."), ref.name)
                stores.append(await beside(build, say))
        for store, name in zip(stores, ("training_file", "validation_file"), strict=False):
            if "" in store.captions:
                raise BadRequest(
                    "Pictures without a caption: give each a text, or say by concept what all of them show.", param=name
                )
        prompts = spec.sample_prompts or list(stores[0].captions[:SAMPLED])
        for text in prompts:
            await asyncio.to_thread(source.chunks, text, params=("sample_prompts",))
        told = [Prompt(text, ()) for text in prompts]
        return Data(stores[0], stores[1] if len(stores) > 1 else None, told, await self._begin(source))

    def _plan(self, source: PictureSource, selection: Selection, data: Data[PictureStore]) -> Plan:
        return plans.resolve_pictures(
            self._spec.hyperparameters,
            source,
            selection,
            len(data.store),
            self._device,
            concept=self._spec.concept,
            samples=bool(data.prompts),
            validates=data.validation is not None,
        )

    def _job(self, source: PictureSource, selection: Selection, plan: Plan, data: Data[PictureStore]) -> PictureJob:
        spec, prompts = self._spec, tuple(data.prompts)
        return PictureJob(
            source, selection, plan, data.store, data.validation, spec.seed, prompts, data.begin, concept=spec.concept
        )

    def _cost(
        self, source: PictureSource, selection: Selection, data: Data[PictureStore], plan: Plan
    ) -> costs.Estimate:
        return source.cost(
            selection,
            plan.micro_rows * plans.pictures_in_a_row(self._spec.concept),
            self._device.precision.dtype.itemsize,
            resolution=plan.resolution,
            moments_bytes_per_param=plans.MOMENTS_BYTES[plan.optimizer],
            keeps_best=plan.early_stop_patience > 0,
        )

    def _estimated_s(self, source: PictureSource, selection: Selection, data: Data[PictureStore], plan: Plan) -> float:
        picture_s = self._worker.picture_s(source.id) or 0.0
        return plans.pictures_s(plan, source, len(data.store), picture_s, self._spec.concept)

    def _say_chosen(self, reporter: Reporter, choice: Chosen, plan: Plan, *, goes_on: bool) -> None:
        reporter.say(f"Latents are computed once: {choice.why}.")
