"""What every route of one server shares: the model, who may ask, what is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from onestill.pipeline import Pipeline
from onestill.pipeline.loaded import LoadedInfo
from onestill.pipeline.picture import picture_bytes
from onestill.serve.access.quota import Access
from onestill.serve.queue.jobs import Picture
from onestill.serve.queue.scheduler import Limits, Scheduler
from onestill.serve.web.metrics import Metrics
from onestill.serve.web.provenance import Stamp
from onestill.serve.web.requests import Bounds, Forms, forms_for
from onestill.serve.web.safety import ImageFilter, PromptFilter, refused_picture, refused_prompt

if TYPE_CHECKING:
    from onestill.serve.gallery.store import Gallery

__all__ = ["Server", "Settings"]

QUICK_PX = 300 * 300  # a JPEG of at most that takes less time than a hop to another thread
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How one server is run.

    Attributes:
        hosts: names it goes by, besides localhost and addresses in digits.
        origins: other sites whose pages may ask.
        bounds: of one request.
        limits: of the scheduler.
        metrics_for_all: tell figures to every address, not only to this machine's.
        prompt_filter, image_filter: what refuses words and pictures; see `onestill.serve.web.safety`.
        stamp: signs the files that the images API hands out.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    limits: Limits = field(default_factory=Limits)
    metrics_for_all: bool = False
    prompt_filter: PromptFilter | None = None
    image_filter: ImageFilter | None = None
    stamp: Stamp | None = None


class Server:
    """One model and its doors. Close it when done.

    Args:
        pipe: a loaded model.
        settings: see there.
        access: who may ask; None is everyone.
        gallery: pictures that visitors show, in the database of `access`; None has none.
    """

    def __init__(
        self, pipe: Pipeline, settings: Settings, access: Access | None = None, gallery: Gallery | None = None
    ) -> None:
        self.pipe = pipe
        self.settings = settings
        self.bounds = settings.bounds
        self.access = access or Access()
        self.gallery = gallery
        self.forms: Forms = forms_for(pipe.info, settings.bounds)
        self.metrics = Metrics()
        self.scheduler = Scheduler(pipe, settings.limits)
        self.live: Counter[str] = Counter()  # address -> live connections
        self._pool = ThreadPoolExecutor(2, "onestill-files")

    @property
    def info(self) -> LoadedInfo:
        """What the model is, and what runs it."""
        return self.pipe.info

    def close(self, grace_s: float = 0.0) -> None:
        """End the scheduler, see there, and everything else."""
        self.scheduler.close(grace_s)
        self._pool.shutdown(wait=True)
        self.access.close()

    async def in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call made in a thread that is not the event loop's."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    async def file_of(self, picture: Picture, kind: str, quality: int) -> bytes:
        """A picture as a PNG, JPEG or WEBP that carries its parameters."""
        width, height = picture.image.size
        if kind == "JPEG" and width * height <= QUICK_PX:
            return picture_bytes(picture.image, kind, picture.metadata, quality=quality)
        return await self.in_pool(lambda: picture_bytes(picture.image, kind, picture.metadata, quality=quality))

    async def signed(self, data: bytes, kind: str) -> bytes:
        """A file with the server's signature in it, where it signs; some tens of milliseconds."""
        stamp = self.settings.stamp
        return data if stamp is None else await self.in_pool(stamp, data, kind)

    async def check_prompt(self, prompt: str) -> None:
        """Raise ApiError for a prompt that the filter refuses."""
        if self.settings.prompt_filter is not None:
            refused_prompt(await self.in_pool(self.settings.prompt_filter, prompt))

    async def check_pictures(self, pictures: Sequence[Picture]) -> None:
        """Raise ApiError where the filter refuses one of the pictures."""
        if self.settings.image_filter is not None:
            refused_picture(await self.in_pool(self.settings.image_filter, [one.image for one in pictures]))

    def count_picture(self, route: str, timings: Mapping[str, float]) -> None:
        """Note a picture that is handed out."""
        self.metrics.count("onestill_pictures_total", route=route)
        for name, value in timings.items():
            self.metrics.observe("onestill_stage_seconds", value / 1000, stage=name.removesuffix("_ms"))
