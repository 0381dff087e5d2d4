from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_PCM_S16LE: _ClassVar[Codec]
    CODEC_OPUS: _ClassVar[Codec]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]

class ControlAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTROL_ACTION_UNSPECIFIED: _ClassVar[ControlAction]
    PAUSE: _ClassVar[ControlAction]
    RESUME: _ClassVar[ControlAction]
    STOP: _ClassVar[ControlAction]
    RELOAD: _ClassVar[ControlAction]

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    IDLE: _ClassVar[SessionState]
    SPEAKING: _ClassVar[SessionState]
    PAUSED: _ClassVar[SessionState]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    COLD: _ClassVar[ModelState]
    LOADING: _ClassVar[ModelState]
    RESIDENT: _ClassVar[ModelState]
    UNLOADING: _ClassVar[ModelState]
    FAILED: _ClassVar[ModelState]
CODEC_UNSPECIFIED: Codec
CODEC_PCM_S16LE: Codec
CODEC_OPUS: Codec
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BATCH: Priority
CONTROL_ACTION_UNSPECIFIED: ControlAction
PAUSE: ControlAction
RESUME: ControlAction
STOP: ControlAction
RELOAD: ControlAction
SESSION_STATE_UNSPECIFIED: SessionState
IDLE: SessionState
SPEAKING: SessionState
PAUSED: SessionState
MODEL_STATE_UNSPECIFIED: ModelState
COLD: ModelState
LOADING: ModelState
RESIDENT: ModelState
UNLOADING: ModelState
FAILED: ModelState

class StartSessionReq(_message.Message):
    __slots__ = ("session_id", "model_id", "voice", "language", "codec", "settings", "priority", "owner", "lease_ttl_ms", "lead_ms")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    VOICE_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    LEAD_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model_id: str
    voice: str
    language: str
    codec: Codec
    settings: _containers.ScalarMap[str, str]
    priority: Priority
    owner: str
    lease_ttl_ms: int
    lead_ms: int
    def __init__(self, session_id: _Optional[str] = ..., model_id: _Optional[str] = ..., voice: _Optional[str] = ..., language: _Optional[str] = ..., codec: _Optional[_Union[Codec, str]] = ..., settings: _Optional[_Mapping[str, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., owner: _Optional[str] = ..., lease_ttl_ms: _Optional[int] = ..., lead_ms: _Optional[int] = ...) -> None: ...

class StartSessionResp(_message.Message):
    __slots__ = ("session_id", "model_id", "family", "voice", "language", "codec", "sample_rate", "frame_ms", "native_sample_rate", "lease_ttl_ms", "fallback", "fallback_reason", "words_estimated")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    VOICE_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    NATIVE_SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    WORDS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model_id: str
    family: str
    voice: str
    language: str
    codec: Codec
    sample_rate: int
    frame_ms: int
    native_sample_rate: int
    lease_ttl_ms: int
    fallback: bool
    fallback_reason: str
    words_estimated: bool
    def __init__(self, session_id: _Optional[str] = ..., model_id: _Optional[str] = ..., family: _Optional[str] = ..., voice: _Optional[str] = ..., language: _Optional[str] = ..., codec: _Optional[_Union[Codec, str]] = ..., sample_rate: _Optional[int] = ..., frame_ms: _Optional[int] = ..., native_sample_rate: _Optional[int] = ..., lease_ttl_ms: _Optional[int] = ..., fallback: _Optional[bool] = ..., fallback_reason: _Optional[str] = ..., words_estimated: _Optional[bool] = ...) -> None: ...

class TextChunk(_message.Message):
    __slots__ = ("text", "is_final", "session_id", "utterance_id", "flush")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_FINAL_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    UTTERANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    text: str
    is_final: bool
    session_id: str
    utterance_id: str
    flush: bool
    def __init__(self, text: _Optional[str] = ..., is_final: _Optional[bool] = ..., session_id: _Optional[str] = ..., utterance_id: _Optional[str] = ..., flush: _Optional[bool] = ...) -> None: ...

class WordMark(_message.Message):
    __slots__ = ("text", "start_ms", "end_ms", "estimated", "char_start", "char_end")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    START_MS_FIELD_NUMBER: _ClassVar[int]
    END_MS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    CHAR_START_FIELD_NUMBER: _ClassVar[int]
    CHAR_END_FIELD_NUMBER: _ClassVar[int]
    text: str
    start_ms: int
    end_ms: int
    estimated: bool
    char_start: int
    char_end: int
    def __init__(self, text: _Optional[str] = ..., start_ms: _Optional[int] = ..., end_ms: _Optional[int] = ..., estimated: _Optional[bool] = ..., char_start: _Optional[int] = ..., char_end: _Optional[int] = ...) -> None: ...

class AudioFrame(_message.Message):
    __slots__ = ("pcm", "sample_rate", "frame_ms", "utterance_id", "seq", "media_time_ms", "words", "last", "codec")
    PCM_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    UTTERANCE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    pcm: bytes
    sample_rate: int
    frame_ms: int
    utterance_id: str
    seq: int
    media_time_ms: int
    words: _containers.RepeatedCompositeFieldContainer[WordMark]
    last: bool
    codec: Codec
    def __init__(self, pcm: _Optional[bytes] = ..., sample_rate: _Optional[int] = ..., frame_ms: _Optional[int] = ..., utterance_id: _Optional[str] = ..., seq: _Optional[int] = ..., media_time_ms: _Optional[int] = ..., words: _Optional[_Iterable[_Union[WordMark, _Mapping]]] = ..., last: _Optional[bool] = ..., codec: _Optional[_Union[Codec, str]] = ...) -> None: ...

class ControlReq(_message.Message):
    __slots__ = ("session_id", "action", "utterance_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    UTTERANCE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    action: ControlAction
    utterance_id: str
    def __init__(self, session_id: _Optional[str] = ..., action: _Optional[_Union[ControlAction, str]] = ..., utterance_id: _Optional[str] = ...) -> None: ...

class ControlResp(_message.Message):
    __slots__ = ("state", "utterance_id", "last_seq", "changes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    UTTERANCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    utterance_id: str
    last_seq: int
    changes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, state: _Optional[_Union[SessionState, str]] = ..., utterance_id: _Optional[str] = ..., last_seq: _Optional[int] = ..., changes: _Optional[_Iterable[str]] = ...) -> None: ...

class EndSessionReq(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class EndSessionResp(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    def __init__(self, frames: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("session_id", "owner", "held_ms", "expires_in_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    HELD_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    owner: str
    held_ms: int
    expires_in_ms: int
    def __init__(self, session_id: _Optional[str] = ..., owner: _Optional[str] = ..., held_ms: _Optional[int] = ..., expires_in_ms: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model_id", "family", "state", "is_default", "refcount", "idle_ms", "ttl_left_ms", "estimated_vram_gb", "measured_vram_gb", "native_sample_rate", "languages", "voices", "tags", "needs_gpu", "supports_lora", "max_streams", "licence", "load_progress", "error", "leases", "fallback")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    REFCOUNT_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    TTL_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_VRAM_GB_FIELD_NUMBER: _ClassVar[int]
    MEASURED_VRAM_GB_FIELD_NUMBER: _ClassVar[int]
    NATIVE_SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    VOICES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_GPU_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_LORA_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    family: str
    state: ModelState
    is_default: bool
    refcount: int
    idle_ms: int
    ttl_left_ms: int
    estimated_vram_gb: float
    measured_vram_gb: float
    native_sample_rate: int
    languages: _containers.RepeatedScalarFieldContainer[str]
    voices: _containers.RepeatedScalarFieldContainer[str]
    tags: _containers.RepeatedScalarFieldContainer[str]
    needs_gpu: bool
    supports_lora: bool
    max_streams: int
    licence: str
    load_progress: float
    error: str
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    fallback: bool
    def __init__(self, model_id: _Optional[str] = ..., family: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., is_default: _Optional[bool] = ..., refcount: _Optional[int] = ..., idle_ms: _Optional[int] = ..., ttl_left_ms: _Optional[int] = ..., estimated_vram_gb: _Optional[float] = ..., measured_vram_gb: _Optional[float] = ..., native_sample_rate: _Optional[int] = ..., languages: _Optional[_Iterable[str]] = ..., voices: _Optional[_Iterable[str]] = ..., tags: _Optional[_Iterable[str]] = ..., needs_gpu: _Optional[bool] = ..., supports_lora: _Optional[bool] = ..., max_streams: _Optional[int] = ..., licence: _Optional[str] = ..., load_progress: _Optional[float] = ..., error: _Optional[str] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., fallback: _Optional[bool] = ...) -> None: ...

class ListModelsReq(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResp(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class LoadModelReq(_message.Message):
    __slots__ = ("model_id", "wait")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    wait: bool
    def __init__(self, model_id: _Optional[str] = ..., wait: _Optional[bool] = ...) -> None: ...

class LoadModelResp(_message.Message):
    __slots__ = ("state", "load_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    load_ms: int
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ..., load_ms: _Optional[int] = ...) -> None: ...

class UnloadModelReq(_message.Message):
    __slots__ = ("model_id", "ignore_ttl")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    IGNORE_TTL_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    ignore_ttl: bool
    def __init__(self, model_id: _Optional[str] = ..., ignore_ttl: _Optional[bool] = ...) -> None: ...

class UnloadModelResp(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ...) -> None: ...

class GetCapReq(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapResp(_message.Message):
    __slots__ = ("name", "adapter", "version", "streaming", "zero_shot", "lora", "cpu_ok", "emotive_zero_prompt", "languages", "sample_rate", "frame_ms", "codecs", "gpu", "vram_gb", "default_model_id", "resident_models", "fallback", "fallback_reason", "draining", "sessions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STREAMING_FIELD_NUMBER: _ClassVar[int]
    ZERO_SHOT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    CPU_OK_FIELD_NUMBER: _ClassVar[int]
    EMOTIVE_ZERO_PROMPT_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    VRAM_GB_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_MODELS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    adapter: str
    version: str
    streaming: bool
    zero_shot: bool
    lora: bool
    cpu_ok: bool
    emotive_zero_prompt: bool
    languages: _containers.RepeatedScalarFieldContainer[str]
    sample_rate: int
    frame_ms: int
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    gpu: bool
    vram_gb: float
    default_model_id: str
    resident_models: _containers.RepeatedScalarFieldContainer[str]
    fallback: bool
    fallback_reason: str
    draining: bool
    sessions: int
    def __init__(self, name: _Optional[str] = ..., adapter: _Optional[str] = ..., version: _Optional[str] = ..., streaming: _Optional[bool] = ..., zero_shot: _Optional[bool] = ..., lora: _Optional[bool] = ..., cpu_ok: _Optional[bool] = ..., emotive_zero_prompt: _Optional[bool] = ..., languages: _Optional[_Iterable[str]] = ..., sample_rate: _Optional[int] = ..., frame_ms: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., gpu: _Optional[bool] = ..., vram_gb: _Optional[float] = ..., default_model_id: _Optional[str] = ..., resident_models: _Optional[_Iterable[str]] = ..., fallback: _Optional[bool] = ..., fallback_reason: _Optional[str] = ..., draining: _Optional[bool] = ..., sessions: _Optional[int] = ...) -> None: ...
