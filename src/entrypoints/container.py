"""The composition root: what is made of what. Nothing is made at import, nothing is wired behind the scenes."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from dependency_injector import containers, providers

from adapters.sql.engines import is_embedded
from adapters.sql.store import SqlStore
from adapters.system import Clock, Ids
from core.model.agent import DEFAULT_MODEL, Catalog
from core.model.ledger import Quotas
from core.model.price import PriceList
from core.model.turn import Turn
from core.ports.agent import Agent
from core.ports.provider_copies import ProviderCopies
from core.ports.store import Store, Transaction
from core.ports.system import Clock as ClockPort
from core.ports.system import Ids as IdsPort
from core.ports.telemetry import UNMEASURED, Telemetry, Vitals
from core.ports.tools import Tools
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.cancel_turn import CancelTurn
from core.use_cases.clean_up_threads import CleanUpThreads
from core.use_cases.definitions import Definitions
from core.use_cases.delete_thread import DeleteThread
from core.use_cases.end_turn import Ended
from core.use_cases.erase_user import EraseUser
from core.use_cases.export_user import ExportUser
from core.use_cases.finish_erasures import FinishErasures
from core.use_cases.follow_turn import FollowTurn
from core.use_cases.hold_user import HoldUser
from core.use_cases.oversee import Oversee
from core.use_cases.places import Places
from core.use_cases.publish_agents import PublishAgents
from core.use_cases.read_erasures import ReadErasures
from core.use_cases.read_threads import ReadThreads
from core.use_cases.read_usage import ReadUsage
from core.use_cases.reconcile_thread import ReconcileThread
from core.use_cases.recover_turns import RecoverTurns
from core.use_cases.report_usage import ReportUsage
from core.use_cases.settle_turn import SettleTurn
from core.use_cases.turn_engine import TurnEngine, TurnLimits
from core.use_cases.turn_feed import TurnFeeds
from entrypoints.settings import Provider, Settings, SettingsError
from entrypoints.telemetry import measuring

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from adapters.openai import ModelWatch
    from entrypoints.grpc_api.access import Access
    from entrypoints.grpc_api.server import Server
    from entrypoints.grpc_api.services.admin import AdminService
    from entrypoints.grpc_api.services.agents import AgentService
    from entrypoints.grpc_api.services.threads import ThreadService
    from entrypoints.grpc_api.services.users import UserService


def _catalog(settings: Settings) -> Catalog:
    from adapters.catalog.loader import CatalogError, load_catalog

    try:
        return load_catalog(settings.agents_dir, settings.openai_assistant_id or "")
    except CatalogError as error:
        raise SettingsError(error.faults) from error


def models_in_use(settings: Settings, catalog: Catalog) -> list[str]:
    """The models that the agents reply with."""
    named = {definition.model for definition in catalog.agents()}
    return sorted({settings.openai_model if model == DEFAULT_MODEL else model for model in named})


def _client(settings: Settings) -> "AsyncOpenAI":
    from adapters.openai import make_client

    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else ""
    return make_client(key, settings.openai_base_url, max_connections=settings.max_turns + 10)


def _agent(settings: Settings, client: "Callable[[], AsyncOpenAI]", telemetry: Telemetry) -> Agent:
    if settings.provider is Provider.PRACTICE:
        from adapters.practice.agent import PracticeAgent

        return PracticeAgent(settings.practice_words_per_second)
    from adapters.openai import OpenAIAgent

    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else ""
    user_key = settings.user_hash_key.get_secret_value() if settings.user_hash_key else key
    return OpenAIAgent(
        client(),
        model=settings.openai_model,
        user_key=user_key or "vida-coach",  # a server without a key is one's own: there is nobody to hide from
        state_mode=settings.openai_state.value,
        background=settings.openai_background,
        context_tokens=settings.openai_context_tokens,
        telemetry=telemetry,
    )


def _copies(settings: Settings, client: "Callable[[], AsyncOpenAI]") -> ProviderCopies:
    if settings.erased_at is Provider.PRACTICE:
        from adapters.practice.copies import NoCopies

        return NoCopies()
    from adapters.openai import OpenAICopies

    return OpenAICopies(client())


def _watch(settings: Settings, client: "AsyncOpenAI", catalog: Catalog, clock: ClockPort) -> "ModelWatch":
    from adapters.openai import ModelWatch

    return ModelWatch(client, models_in_use(settings, catalog), clock)


def _tools(settings: Settings, store: Store, ids: IdsPort) -> Tools:
    from adapters.tools.definition import ToolDefinitionError
    from adapters.tools.goals import goal_tools
    from adapters.tools.loading import load_tools
    from adapters.tools.registry import Registry

    try:
        return Registry([*goal_tools(store, ids), *load_tools(settings.tools)])
    except ToolDefinitionError as error:
        raise SettingsError([f"tools: {fault}" for fault in error.faults]) from error


def _quotas(settings: Settings) -> Quotas:
    return Quotas(turns_per_day=settings.quota_turns, tokens_per_day=settings.quota_tokens)


def _prices(settings: Settings) -> PriceList:
    from adapters.prices.loader import PricesError, load_prices

    try:
        return load_prices(settings.prices)
    except PricesError as error:
        raise SettingsError([f"VIDA_PRICES: {fault}" for fault in error.faults]) from error


def _measured_agent(telemetry: Telemetry, agent: Agent) -> Agent:
    return telemetry.agent(agent)


def _measured_tools(telemetry: Telemetry, tools: Tools) -> Tools:
    return telemetry.tools(tools)


def _limits(settings: Settings) -> TurnLimits:
    return TurnLimits(
        max_turns=settings.max_turns,
        max_turns_per_user=settings.max_turns_per_user,
        budget=settings.turn_budget,
        restart=settings.restart_interrupted,
    )


def _recover(settings: Settings, store: Store, engine: TurnEngine, feeds: TurnFeeds, ids: IdsPort) -> RecoverTurns:
    return RecoverTurns(
        store=store,
        engine=engine,
        feeds=feeds,
        ids=ids,
        lease=settings.lease,
        alone=is_embedded(settings.database),  # the lock beside the file says so
    )


_SPARE = 100
"""Connections and calls beside those that follow turns."""


def _stream_seconds(settings: Settings) -> float:
    return settings.turn_budget + 60


def _agent_service(
    settings: Settings,
    accept: AcceptMessage,
    follow: FollowTurn,
    cancel: CancelTurn,
    threads: ReadThreads,
    catalog: Catalog,
    agent: Agent,
) -> "AgentService":
    from entrypoints.grpc_api.services.agents import AgentService, Streams

    most = 2 * settings.max_turns
    return AgentService(
        accept=accept,
        follow=follow,
        cancel=cancel,
        threads=threads,
        catalog=catalog,
        agent=agent,
        streams=Streams(Places(most, max(most // 10, 64)), seconds=_stream_seconds(settings)),
    )


def _thread_service(threads: ReadThreads, delete: DeleteThread) -> "ThreadService":
    from entrypoints.grpc_api.services.threads import ThreadService

    return ThreadService(threads, delete)


def _left_after(settings: Settings) -> float:
    """Seconds after which an erasure was left by its process. Alone, whatever is not at work here was."""
    return 0.0 if is_embedded(settings.database) else 2 * settings.lease


def _user_service(export: ExportUser, erase: EraseUser, usage: ReadUsage) -> "UserService":
    from entrypoints.grpc_api.services.users import UserService

    return UserService(export, erase, usage)


def _settled(engine: TurnEngine, ended: Ended) -> None:
    """Has the engine take notice of a turn that an operator ended."""
    engine.abandon(ended.turn.id)
    engine.ended(ended)


def _oversee(settings: Settings, store: Store, alone: bool) -> Oversee:
    return Oversee(store, budget=settings.turn_budget, lease=settings.lease, alone=alone)


def _admin_service(
    settings: Settings,
    cleanup: CleanUpThreads,
    hold: HoldUser,
    erasures: ReadErasures,
    usage: ReportUsage,
    oversee: Oversee,
    settle: SettleTurn,
    agents: PublishAgents,
    reconcile: ReconcileThread,
) -> "AdminService":
    from entrypoints.grpc_api.services.admin import AdminService

    return AdminService(
        cleanup=cleanup,
        ttl_days=settings.openai_thread_ttl,
        hold=hold,
        erasures=erasures,
        usage=usage,
        oversee=oversee,
        settle=settle,
        agents=agents,
        reconcile=reconcile,
    )


def _access(settings: Settings) -> "Access":
    from entrypoints.identity import access

    return access(settings)


def _server(
    settings: Settings,
    agents: "AgentService",
    threads: "ThreadService",
    users: "UserService",
    ids: IdsPort,
    access: "Access",
    telemetry: Telemetry,
    admin: "AdminService | None" = None,
    on_socket: bool = False,
    reflected: bool = True,
    channelz: bool = False,
) -> "Server":
    from entrypoints.grpc_api.server import Bounds, Server
    from entrypoints.identity import credentials

    return Server(
        agents=agents,
        threads=threads,
        users=users,
        ids=ids,
        bounds=Bounds(
            request_bytes=settings.max_request_bytes,
            # One proxy may bring all of them, or each comes by itself; and each may be read twice.
            connections=settings.max_turns + _SPARE,
            streams=settings.max_turns + _SPARE,
            calls=2 * settings.max_turns + _SPARE,
            stream_seconds=_stream_seconds(settings),
            # A command that takes hours is not cut off, and there is no other replica behind that socket.
            connection_seconds=math.inf if on_socket else settings.max_connection_age,
        ),
        reflected=reflected,
        access=access,
        credentials=None if on_socket else credentials(settings),
        channelz=channelz,
        admin=admin,
        telemetry=telemetry,
    )


class Container(containers.DeclarativeContainer):
    """Every part of the service. A test builds them all."""

    settings = providers.Dependency(instance_of=Settings)
    clock = providers.Singleton(Clock)
    ids = providers.Singleton(Ids)
    owner = providers.Singleton(lambda ids: ids.new(), ids)
    telemetry: providers.Provider[Telemetry] = providers.Dependency(default=UNMEASURED)
    store = providers.Singleton(SqlStore, settings.provided.database, clock, telemetry=telemetry)
    catalog = providers.Singleton(_catalog, settings)
    client = providers.Singleton(_client, settings)
    agent = providers.Singleton(_agent, settings, client.provider, telemetry)
    watch = providers.Singleton(_watch, settings, client, catalog, clock)
    tools = providers.Singleton(_tools, settings, store, ids)
    quotas = providers.Singleton(_quotas, settings)
    prices = providers.Singleton(_prices, settings)
    feeds = providers.Singleton(TurnFeeds)
    definitions = providers.Singleton(Definitions, catalog)
    engine = providers.Singleton(
        TurnEngine,
        store=store,
        agent=providers.Callable(_measured_agent, telemetry, agent),
        tools=providers.Callable(_measured_tools, telemetry, tools),
        feeds=feeds,
        ids=ids,
        definitions=definitions,
        owner=owner,
        limits=providers.Factory(_limits, settings),
        telemetry=telemetry,
    )
    recover = providers.Singleton(_recover, settings, store, engine, feeds, ids)
    accept = providers.Singleton(
        AcceptMessage,
        store=store,
        engine=engine,
        catalog=catalog,
        definitions=definitions,
        ids=ids,
        quotas=quotas,
        telemetry=telemetry,
    )
    follow = providers.Singleton(FollowTurn, store, feeds)
    cancel = providers.Singleton(CancelTurn, store=store, engine=engine, ids=ids)
    gone: providers.Provider[Callable[[Turn], object]] = providers.Dependency(default=engine.provided.gone)
    took: providers.Provider[Callable[[Ended], object]] = providers.Dependency(
        default=providers.Callable(partial, _settled, engine)
    )
    alone: providers.Provider[bool] = providers.Dependency(instance_of=bool, default=False)
    copies = providers.Singleton(_copies, settings, client.provider)
    erased = providers.Singleton(asyncio.Event)
    delete = providers.Singleton(DeleteThread, store=store, gone=gone, erased=erased.provided.set)
    erase_user = providers.Singleton(
        EraseUser,
        store=store,
        ids=ids,
        gone=gone,
        erased=erased.provided.set,
        left_after=providers.Callable(_left_after, settings),
    )
    finish_erasures = providers.Singleton(
        FinishErasures, store=store, copies=copies, erase_user=erase_user, wanted=erased, telemetry=telemetry
    )
    export_user = providers.Singleton(ExportUser, store)
    hold_user = providers.Singleton(HoldUser, store)
    erasures = providers.Singleton(ReadErasures, store, settings.provided.erased_at.value)
    threads = providers.Singleton(ReadThreads, store)
    cleanup = providers.Singleton(CleanUpThreads, store, erased=erased.provided.set)
    usage = providers.Singleton(ReadUsage, store, quotas)
    report_usage = providers.Singleton(ReportUsage, store, prices)
    agent_service = providers.Singleton(_agent_service, settings, accept, follow, cancel, threads, catalog, agent)
    thread_service = providers.Singleton(_thread_service, threads, delete)
    user_service = providers.Singleton(_user_service, export_user, erase_user, usage)
    oversee = providers.Singleton(_oversee, settings, store, alone)
    settle = providers.Singleton(SettleTurn, store=store, ids=ids, took=took, alone=alone)
    publish_agents = providers.Singleton(PublishAgents, store)
    reconcile = providers.Singleton(ReconcileThread, store, agent.provider)
    admin_service = providers.Singleton(
        _admin_service,
        settings,
        cleanup,
        hold_user,
        erasures,
        report_usage,
        oversee,
        settle,
        publish_agents,
        reconcile,
    )
    access = providers.Singleton(_access, settings)
    server = providers.Factory(
        _server,
        settings,
        agent_service,
        thread_service,
        user_service,
        ids,
        access=access,
        telemetry=telemetry,
    )


@asynccontextmanager
async def opened(settings: Settings, *, replying: bool = False) -> AsyncIterator[Container]:
    """The parts that need the record alone, for commands; with `replying` the agent too. The schema must be
    current."""
    container = Container(
        settings=settings,
        # No turn runs here; other processes hear of theirs from the store.
        gone=providers.Object(lambda _: None),
        took=providers.Object(lambda _: None),
        # On an embedded database there are no others: whoever holds a turn is gone.
        alone=is_embedded(settings.database),
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(container.store().aclose)
        if replying:
            stack.push_async_callback(container.agent().aclose)
        yield container


@asynccontextmanager
async def running(settings: Settings, *, watching: bool = False) -> AsyncIterator[Container]:
    """The whole service, ready for messages: agents published, turns claimed that wait for a process.

    `watching` has it ask every day how long the provider's models stay, and measure where that is configured.
    On leaving, turns that still run are given up: they wait for another process, or end INTERRUPTED. Raises
    SettingsError and StoreUnavailable.
    """
    async with AsyncExitStack() as stack:
        telemetry = await stack.enter_async_context(measuring(settings)) if watching else UNMEASURED
        container = Container(settings=settings, telemetry=telemetry)
        stack.push_async_callback(container.store().aclose)
        catalog = _checked(container)
        stack.push_async_callback(container.agent().aclose)
        if settings.erased_at is not settings.provider:
            stack.push_async_callback(container.client().close)  # the agent has no use for it
        await _publish(container.store(), catalog)
        container.engine().start()
        stack.push_async_callback(container.engine().drain, 0)
        stack.push_async_callback(container.accept().settle)
        stack.push_async_callback(container.recover().stop)
        await container.recover().start()
        stack.push_async_callback(container.erase_user().settle)
        stack.push_async_callback(container.finish_erasures().stop)
        container.finish_erasures().start()
        await stack.enter_async_context(telemetry.watching(lambda: _vitals(container)))
        if watching and settings.provider is Provider.OPENAI:
            stack.push_async_callback(container.watch().stop)
            container.watch().start()
        yield container


def _vitals(container: Container) -> Vitals:
    feeds: TurnFeeds = container.feeds()
    return Vitals(
        running=container.engine().running,
        followers=feeds.followers(),
        lag=feeds.lag(),
        refusing=container.agent().refusal() is not None,
    )


def _checked(container: Container) -> Catalog:
    """The catalog, if it, the tools that it names and the prices are whole. Raises SettingsError with the faults
    of all."""
    faults: list[str] = []
    for part in (container.catalog, container.tools, container.prices):
        try:
            part()
        except SettingsError as error:
            faults += error.faults
    if not faults:
        tools: Tools = container.tools()
        faults = [
            f"agent {definition.id}: there is no tool {name!r}"
            for definition in container.catalog().agents()
            for name in definition.tools
            if name not in tools.names
        ]
    if faults:
        raise SettingsError(faults)
    catalog: Catalog = container.catalog()
    return catalog


async def _publish(store: Store, catalog: Catalog) -> None:
    from core.ports.agents import AgentVersionChanged

    def publish(tx: Transaction) -> None:
        for definition in catalog.agents():
            tx.agents.publish(definition)

    try:
        await store.write(publish)
    except AgentVersionChanged as error:
        raise SettingsError([str(error)]) from error
