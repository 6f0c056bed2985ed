from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Context(_message.Message):
    __slots__ = ("session_id", "round", "prefix_length", "prefix_crc32", "new_tokens", "wait_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CRC32_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    round: int
    prefix_length: int
    prefix_crc32: int
    new_tokens: _containers.RepeatedScalarFieldContainer[int]
    wait_ms: int
    def __init__(self, session_id: _Optional[str] = ..., round: _Optional[int] = ..., prefix_length: _Optional[int] = ..., prefix_crc32: _Optional[int] = ..., new_tokens: _Optional[_Iterable[int]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class TokenTree(_message.Message):
    __slots__ = ("token_ids", "parents", "log_probs", "distributions", "source")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    distributions: _containers.RepeatedCompositeFieldContainer[Distribution]
    source: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., parents: _Optional[_Iterable[int]] = ..., log_probs: _Optional[_Iterable[float]] = ..., distributions: _Optional[_Iterable[_Union[Distribution, _Mapping]]] = ..., source: _Optional[str] = ...) -> None: ...

class Distribution(_message.Message):
    __slots__ = ("node", "token_ids", "probabilities")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    node: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, node: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "rejection")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    rejection: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., rejection: _Optional[bool] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "compute_ms", "server_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    SERVER_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    compute_ms: float
    server_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., server_ms: _Optional[float] = ...) -> None: ...

class HiddenStates(_message.Message):
    __slots__ = ("first", "count", "form", "data", "scales", "projected")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PROJECTED_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    form: str
    data: bytes
    scales: bytes
    projected: bool
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., form: _Optional[str] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., projected: _Optional[bool] = ...) -> None: ...

class WantedStates(_message.Message):
    __slots__ = ("first", "layers", "form", "projected", "message_bytes", "only")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    PROJECTED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ONLY_FIELD_NUMBER: _ClassVar[int]
    first: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    form: str
    projected: bool
    message_bytes: int
    only: bool
    def __init__(self, first: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., form: _Optional[str] = ..., projected: _Optional[bool] = ..., message_bytes: _Optional[int] = ..., only: _Optional[bool] = ...) -> None: ...

class GenerateDraftsRequest(_message.Message):
    __slots__ = ("context", "max_draft_tokens", "branching", "stop_token_ids", "tree_nodes", "tree_width", "sampling", "vocab_size", "length_limit", "ahead", "forced", "memory", "prompt_tokens", "states", "states_only", "drafted_ahead", "p_min")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BRANCHING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TREE_NODES_FIELD_NUMBER: _ClassVar[int]
    TREE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_LIMIT_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    STATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_AHEAD_FIELD_NUMBER: _ClassVar[int]
    P_MIN_FIELD_NUMBER: _ClassVar[int]
    context: Context
    max_draft_tokens: int
    branching: _containers.RepeatedScalarFieldContainer[int]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tree_nodes: int
    tree_width: int
    sampling: Sampling
    vocab_size: int
    length_limit: int
    ahead: Ahead
    forced: Forced
    memory: str
    prompt_tokens: int
    states: _containers.RepeatedCompositeFieldContainer[HiddenStates]
    states_only: bool
    drafted_ahead: bool
    p_min: float
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., max_draft_tokens: _Optional[int] = ..., branching: _Optional[_Iterable[int]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., tree_nodes: _Optional[int] = ..., tree_width: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., vocab_size: _Optional[int] = ..., length_limit: _Optional[int] = ..., ahead: _Optional[_Union[Ahead, _Mapping]] = ..., forced: _Optional[_Union[Forced, _Mapping]] = ..., memory: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., states: _Optional[_Iterable[_Union[HiddenStates, _Mapping]]] = ..., states_only: _Optional[bool] = ..., drafted_ahead: _Optional[bool] = ..., p_min: _Optional[float] = ...) -> None: ...

class Forced(_message.Message):
    __slots__ = ("tokens", "right")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    right: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., right: _Optional[_Iterable[bool]] = ...) -> None: ...

class Ahead(_message.Message):
    __slots__ = ("fan_out", "max_draft_tokens", "full_acceptance")
    FAN_OUT_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    fan_out: int
    max_draft_tokens: int
    full_acceptance: bool
    def __init__(self, fan_out: _Optional[int] = ..., max_draft_tokens: _Optional[int] = ..., full_acceptance: _Optional[bool] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("accepted_tokens", "next_token", "tree")
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    accepted_tokens: _containers.RepeatedScalarFieldContainer[int]
    next_token: int
    tree: TokenTree
    def __init__(self, accepted_tokens: _Optional[_Iterable[int]] = ..., next_token: _Optional[int] = ..., tree: _Optional[_Union[TokenTree, _Mapping]] = ...) -> None: ...

class GenerateDraftsReply(_message.Message):
    __slots__ = ("tree", "timings", "round", "is_ahead", "outcomes")
    TREE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    IS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    tree: TokenTree
    timings: Timings
    round: int
    is_ahead: bool
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, tree: _Optional[_Union[TokenTree, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., round: _Optional[int] = ..., is_ahead: _Optional[bool] = ..., outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class VerifyDraftsRequest(_message.Message):
    __slots__ = ("context", "tree", "sampling", "wanted_states", "gamma")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    WANTED_STATES_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    context: Context
    tree: TokenTree
    sampling: Sampling
    wanted_states: WantedStates
    gamma: int
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., tree: _Optional[_Union[TokenTree, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., wanted_states: _Optional[_Union[WantedStates, _Mapping]] = ..., gamma: _Optional[int] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("round", "outcomes", "gamma")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    round: int
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    gamma: int
    def __init__(self, round: _Optional[int] = ..., outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., gamma: _Optional[int] = ...) -> None: ...

class StreamVerifyRequest(_message.Message):
    __slots__ = ("verify", "prepared")
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    verify: VerifyDraftsRequest
    prepared: Prepared
    def __init__(self, verify: _Optional[_Union[VerifyDraftsRequest, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ...) -> None: ...

class VerifyDraftsReply(_message.Message):
    __slots__ = ("accepted_nodes", "accepted_tokens", "next_token", "timings", "round", "states", "states_only", "gamma")
    ACCEPTED_NODES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    STATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    accepted_nodes: _containers.RepeatedScalarFieldContainer[int]
    accepted_tokens: _containers.RepeatedScalarFieldContainer[int]
    next_token: int
    timings: Timings
    round: int
    states: HiddenStates
    states_only: bool
    gamma: int
    def __init__(self, accepted_nodes: _Optional[_Iterable[int]] = ..., accepted_tokens: _Optional[_Iterable[int]] = ..., next_token: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., round: _Optional[int] = ..., states: _Optional[_Union[HiddenStates, _Mapping]] = ..., states_only: _Optional[bool] = ..., gamma: _Optional[int] = ...) -> None: ...

class StreamTextRequest(_message.Message):
    __slots__ = ("context", "sampling", "max_tokens", "stop_token_ids")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    context: Context
    sampling: Sampling
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamTextReply(_message.Message):
    __slots__ = ("token_ids", "timings")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    timings: Timings
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class EndSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class EndSessionReply(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: _Optional[bool] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("with_tokenizer", "usage")
    WITH_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    with_tokenizer: bool
    usage: bool
    def __init__(self, with_tokenizer: _Optional[bool] = ..., usage: _Optional[bool] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("role", "model", "version", "weights_sha256", "tokenizer_sha256", "parameters", "dtype", "device", "threads", "skip_layers", "vocab_size", "max_context", "eos_token_ids", "pid", "environment", "runtime", "tokenizer_files", "limits", "usage", "states_needed", "states_given")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RuntimeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TokenizerFilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    SKIP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FILES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STATES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    STATES_GIVEN_FIELD_NUMBER: _ClassVar[int]
    role: str
    model: str
    version: str
    weights_sha256: str
    tokenizer_sha256: str
    parameters: int
    dtype: str
    device: str
    threads: int
    skip_layers: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    max_context: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    pid: int
    environment: _containers.ScalarMap[str, str]
    runtime: _containers.ScalarMap[str, str]
    tokenizer_files: _containers.ScalarMap[str, bytes]
    limits: Limits
    usage: Usage
    states_needed: StatesNeeded
    states_given: StatesGiven
    def __init__(self, role: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., tokenizer_sha256: _Optional[str] = ..., parameters: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ..., skip_layers: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., pid: _Optional[int] = ..., environment: _Optional[_Mapping[str, str]] = ..., runtime: _Optional[_Mapping[str, str]] = ..., tokenizer_files: _Optional[_Mapping[str, bytes]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., states_needed: _Optional[_Union[StatesNeeded, _Mapping]] = ..., states_given: _Optional[_Union[StatesGiven, _Mapping]] = ...) -> None: ...

class StatesNeeded(_message.Message):
    __slots__ = ("layers", "hidden_size", "vocab_size", "forms", "projection_sha256")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_SHA256_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    hidden_size: int
    vocab_size: int
    forms: _containers.RepeatedScalarFieldContainer[str]
    projection_sha256: str
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., forms: _Optional[_Iterable[str]] = ..., projection_sha256: _Optional[str] = ...) -> None: ...

class StatesGiven(_message.Message):
    __slots__ = ("num_layers", "hidden_size", "forms", "projection_sha256")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_SHA256_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    hidden_size: int
    forms: _containers.RepeatedScalarFieldContainer[str]
    projection_sha256: str
    def __init__(self, num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., forms: _Optional[_Iterable[str]] = ..., projection_sha256: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("cpu_ms", "energy_j", "no_energy")
    class EnergyJEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_J_FIELD_NUMBER: _ClassVar[int]
    NO_ENERGY_FIELD_NUMBER: _ClassVar[int]
    cpu_ms: float
    energy_j: _containers.ScalarMap[str, float]
    no_energy: str
    def __init__(self, cpu_ms: _Optional[float] = ..., energy_j: _Optional[_Mapping[str, float]] = ..., no_energy: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("tree_nodes", "draft_tokens", "children", "tree_width", "fan_out", "stop_tokens", "message_bytes", "waiting_messages", "sessions", "calls", "streams")
    TREE_NODES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    TREE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    FAN_OUT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    tree_nodes: int
    draft_tokens: int
    children: int
    tree_width: int
    fan_out: int
    stop_tokens: int
    message_bytes: int
    waiting_messages: int
    sessions: int
    calls: int
    streams: int
    def __init__(self, tree_nodes: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., children: _Optional[int] = ..., tree_width: _Optional[int] = ..., fan_out: _Optional[int] = ..., stop_tokens: _Optional[int] = ..., message_bytes: _Optional[int] = ..., waiting_messages: _Optional[int] = ..., sessions: _Optional[int] = ..., calls: _Optional[int] = ..., streams: _Optional[int] = ...) -> None: ...
