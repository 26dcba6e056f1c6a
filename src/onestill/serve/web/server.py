"""What every route of one server shares, and the one way from a request to its pictures: `Server.draw`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from starlette.requests import Request

from onestill.pipeline import Pipeline
from onestill.pipeline.loaded import LoadedInfo
from onestill.pipeline.picture import picture_bytes
from onestill.serve.access.quota import Access, Visitor
from onestill.serve.errors import ApiError, TooLate
from onestill.serve.metrics import Metrics
from onestill.serve.process import lower_priority
from onestill.serve.provenance import Stamp
from onestill.serve.queue.jobs import Job, Picture
from onestill.serve.queue.scheduler import Limits, Scheduler, Slot
from onestill.serve.safety import ImageFilter, PromptFilter, refuse_pictures, refuse_prompt
from onestill.serve.uploads.decoder import Decoder, Room
from onestill.serve.web.requests import Bounds, Encoding, Form, Forms, forms_for, job_of
from onestill.text.tokenize import PromptTokenizer

if TYPE_CHECKING:
    from onestill.serve.gallery.store import Gallery

__all__ = ["Drawing", "File", "Server", "Settings", "Uploads", "while_there"]

MASKED_STRENGTH = 1.0  # unless asked otherwise: who sends OpenAI's API a mask wants something else inside it
QUICK_PX = 300 * 300  # encoding a JPEG of at most that many pixels takes less time than a hop to another thread
T = TypeVar("T")
AnyForm = TypeVar("AnyForm", bound=Form)


@dataclass(frozen=True)
class Settings:
    """How one server is run.

    Attributes:
        hosts: names that the server answers to, besides localhost and IP addresses.
        origins: other sites whose pages may send requests.
        bounds: of one request.
        aliases: other names of the model in requests.
        limits: of the scheduler.
        metrics_for_all: show metrics to every address, not only to this machine's.
        prompt_filter, image_filter: what refuses prompts and pictures; see `onestill.serve.safety`.
        stamp: signs the files of the images API and of the gallery.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    aliases: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    metrics_for_all: bool = False
    prompt_filter: PromptFilter | None = None
    image_filter: ImageFilter | None = None
    stamp: Stamp | None = None


class Server:
    """One model and all that its routes share. Close it when done.

    Args:
        pipe: a loaded model.
        settings: see there.
        access: who may draw, and how much; None lets everyone draw any number.
        gallery: pictures that visitors publish, in the database of `access`; None has no gallery.
        load: loads the model once more, where its engine is broken; None never does.

    Attributes:
        info: what the model is, and what runs it.
    """

    def __init__(
        self,
        pipe: Pipeline,
        settings: Settings,
        access: Access | None = None,
        gallery: Gallery | None = None,
        load: Callable[[], Pipeline] | None = None,
    ) -> None:
        self.info: LoadedInfo = pipe.info
        self.settings = settings
        self.bounds = settings.bounds
        self.access = access or Access()
        self.gallery = gallery
        self.forms: Forms = forms_for(pipe.info, settings.bounds, settings.aliases)
        self._tokenizer = PromptTokenizer(pipe.info)
        self.metrics = Metrics()
        self.scheduler = Scheduler(pipe, settings.limits, load)
        self.live: Counter[str] = Counter()  # address -> live connections
        self.uploads = Room(self.bounds.uploads, self.bounds.body)
        self._decoder = Decoder()
        self._pool = ThreadPoolExecutor(2, "onestill-files", lower_priority)

    def drain(self, grace_s: float) -> None:
        """End the scheduler, as `Scheduler.close` says; uploads that are not decoded by then are refused."""
        self._decoder.refuse()
        self.scheduler.close(grace_s)
        self._decoder.close()

    def check_model(self, name: str) -> None:
        """Refuse (ApiError, 404) a name that is not the model's."""
        if name not in (self.info.name, *self.settings.aliases):
            raise ApiError(404, f"There is no such model here; this server has '{self.info.name}'.", "model_not_found")

    async def count_tokens(self, prompt: str) -> int:
        """How many tokens of a prompt the model reads, those at both ends included."""
        return int((await self.in_pool(self._tokenizer, [prompt])).mask.sum())

    def close(self, grace_s: float = 0.0) -> None:
        """End the scheduler, as `Scheduler.close` says, and everything else."""
        self.drain(grace_s)
        self._pool.shutdown(wait=True)
        self.access.close()

    async def in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call made in a thread, so that the event loop goes on meanwhile.

        Raises:
            TooLate: it took as long as a request may wait.
        """
        result = asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        try:
            await asyncio.wait({result}, timeout=self.settings.limits.timeout_s)
            if not result.done():
                raise TooLate("The server needs too long for this at present; try again in a moment.", 5)
            return result.result()
        finally:
            result.cancel()

    async def draw(
        self,
        visitor: Visitor,
        form: AnyForm,
        upload: bytes | None = None,
        *,
        mask: bytes | None = None,
        request_id: str | None = None,
        slot: Slot | None = None,
        on_picture: Callable[[int, Picture], None] | None = None,
        check_quota: bool = True,
    ) -> Drawing[AnyForm]:
        """Check a request and queue it. Every route draws by this method.

        The order is: prompt filter, quota, upload, queue; then in `Drawing.files`: image filter, encoding, count. So
        nobody has an upload decoded or a picture drawn beyond the quota, and nothing is counted that was not drawn.

        Args:
            visitor: who asks.
            form: the validated request.
            upload: the file of a picture to start from.
            mask: the file of its mask.
            request_id: names the seed where the request has none; see `job_of`.
            slot: the place of a live connection; None queues behind the visitor's other requests.
            on_picture: called in the model's thread with each picture's index as it is drawn.
            check_quota: False where the visitor is known to have enough left.

        Raises:
            ApiError: the request is refused.
        """
        job = job_of(form, self.info, request_id=request_id)
        if self.settings.prompt_filter is not None:
            refuse_prompt(await self.in_pool(self.settings.prompt_filter, job.prompt))
        if check_quota:
            await self.access.check(visitor, len(job.seeds))
        if upload is not None:
            size = (job.height, job.width)
            job = replace(job, image=await self._decoder.read(visitor.source, upload, *size, self.bounds.upload_px))
            if mask is not None:
                area = await self._decoder.read(visitor.source, mask, *size, self.bounds.upload_px, upload)
                job = replace(job, mask=area, strength=getattr(form, "strength", None) or MASKED_STRENGTH)
        if slot is not None:
            future = slot.put(job)
        else:
            future = self.scheduler.submit(job, visitor.name, visitor.address, on_picture, client=visitor.client)
        return Drawing(self, visitor, form, job, future)

    async def encode(self, picture: Picture, encoding: Encoding) -> bytes:
        """A picture as a file that carries its parameters."""
        kind, quality = encoding.kind, encoding.quality
        metadata = picture.metadata if encoding.with_prompt else {**picture.metadata, "prompt": ""}

        def write() -> bytes:
            return picture_bytes(picture.image, kind, metadata, quality=quality)

        width, height = picture.image.size
        data = write() if kind == "JPEG" and width * height <= QUICK_PX else await self.in_pool(write)
        stamp = self.settings.stamp
        return await self.in_pool(stamp, data, kind) if stamp is not None and encoding.signed else data

    def count_picture(self, route: str, timings: Mapping[str, float]) -> None:
        """Count in the metrics a picture that is handed out."""
        self.metrics.count("onestill_pictures_total", route=route)
        for name, value in timings.items():
            self.metrics.observe("onestill_stage_seconds", value / 1000, stage=name.removesuffix("_ms"))


class Uploads(NamedTuple):
    """The files of an edit: the image to start from, its mask, and how many images there were."""

    image: bytes
    mask: bytes | None
    images: int


class File(NamedTuple):
    """A picture, its encoded bytes, and how long the encoding took."""

    picture: Picture
    data: bytes
    compress_ms: float


@dataclass(frozen=True)
class Drawing(Generic[AnyForm]):
    """A request in the queue. Cancelling `future` withdraws it."""

    server: Server
    visitor: Visitor
    form: AnyForm
    job: Job
    future: Future[list[Picture]]

    async def pictures(self, request: Request) -> list[Picture]:
        """The pictures, unless the client of the request disconnects first, which withdraws the job."""
        return await while_there(request, asyncio.wrap_future(self.future))

    async def files(
        self, pictures: Sequence[Picture], accept: Callable[[Sequence[File]], Awaitable[None]] | None = None
    ) -> list[File]:
        """Pictures of this job as files that may be handed out: filtered, encoded, and counted on the visitor's quota.

        A partial image is not counted.

        Args:
            pictures: all of the job's, or those that are drawn.
            accept: is given the files before they are counted, and may raise to refuse them.

        Raises:
            ApiError: the image filter refuses one, or the quota was used up meanwhile; then none is counted.
        """
        server = self.server
        if server.settings.image_filter is not None:
            refuse_pictures(await server.in_pool(server.settings.image_filter, [one.image for one in pictures]))
        files = []
        for picture in pictures:
            started = time.perf_counter()
            data = await server.encode(picture, self.form.encoding)
            files.append(File(picture, data, (time.perf_counter() - started) * 1000))
        if accept is not None:
            await accept(files)
        if whole := sum(picture.partial is None for picture in pictures):
            await server.access.spend(self.visitor, whole)
        return files


async def while_there(request: Request, awaited: Awaitable[T]) -> T:
    """The result of what the client of a request waits for, which is cancelled where the client disconnects first.

    The body of the request must have been read.
    """
    result = asyncio.ensure_future(awaited)
    watch = asyncio.create_task(_disconnected(request))
    try:
        waiting: set[asyncio.Future[Any]] = {result, watch}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ApiError(400, "The client went away.", "client_gone")
        return result.result()
    finally:
        watch.cancel()
        result.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
