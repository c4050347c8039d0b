"""Who may call: credentials to callers, callers to what they may do. rpc/interceptors.py asks for every call."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import grpc

from parleyd.config import SecuritySettings
from parleyd.errors import PermissionDenied, StartupError, Unauthenticated
from parleyd.security.caller import Caller, Rules, address_identity, certificate_identity
from parleyd.security.limits import Limits
from parleyd.security.watched import Watched

if TYPE_CHECKING:  # they cost time to import, and only some services use them
    from parleyd.security.api_keys import ApiKeys
    from parleyd.security.client_rules import ClientRules
    from parleyd.security.tls import Certificates
    from parleyd.security.tokens import Tokens

_logger = logging.getLogger("parleyd.security")

_REFRESH_S = 1.0
_MAX_CREDENTIAL_CHARS = 8 * 1024

Context = grpc.aio.ServicerContext[Any, Any]


class Guard:
    """One service's security. `rpcs` are the names of its methods, which clients may be confined to.

    Raises StartupError where the settings contradict each other or a file is broken.
    """

    def __init__(self, settings: SecuritySettings, rpcs: Sequence[str]) -> None:
        _check(settings)
        self._demands_certificates = settings.tls_client_ca is not None
        self._demands_bearer = settings.api_keys is not None or settings.jwks is not None
        self._defaults = Rules(
            priorities=settings.allow_priorities or not self.is_on,
            max_open_calls=settings.max_open_calls,
            requests_per_minute=settings.requests_per_minute,
        )
        self._limits = Limits()
        self._certificates = _certificates(settings)
        self._keys = _keys(settings, rpcs, self._defaults)
        self._tokens = _tokens(settings)
        self._rules = _client_rules(settings, rpcs, self._defaults)

    @property
    def is_on(self) -> bool:
        """Whether callers must show credentials of some kind."""
        return self._demands_certificates or self._demands_bearer

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For the port; None is plain text."""
        return None if self._certificates is None else self._certificates.server_credentials()

    async def keep_fresh(self) -> None:
        """Reads files again when they change, for ever."""
        files = (self._certificates, self._keys, self._tokens, self._rules)
        watched = [each for each in files if each is not None]
        is_failing = False
        while watched:
            await asyncio.sleep(_REFRESH_S)
            try:
                await asyncio.to_thread(lambda: [each.refresh() for each in watched])
                is_failing = False
            except Exception as error:  # no thread can be had: nobody would notice that the watching has ended
                if not is_failing:
                    _logger.error("keys and certificates cannot be read again for now: %s", error)
                is_failing = True

    def check_credentials(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller | None:
        """Whom the call's key or token stands for; None where none is asked for. Raises Unauthenticated."""
        if not self._demands_bearer:
            return None
        credential = _bearer(metadata or ())
        if self._tokens is not None and (credential.count(".") == 2 or self._keys is None):
            return self._with_rules(self._tokens.value.verify(credential))
        caller = self._keys.value.find(credential) if self._keys is not None else None
        if caller is None:
            raise Unauthenticated("unknown key")
        return caller

    def identify(self, context: Context) -> Caller:
        """The caller of a call that carries no credential: by its certificate, else by its address."""
        address = address_identity(context)
        if not self._demands_certificates:
            return self._with_rules(address)
        # Without a name it is still a certificate: rules for all of them hold for it.
        return self._with_rules(certificate_identity(context.auth_context()) or f"cert:{address}")

    def _with_rules(self, identity: str) -> Caller:
        return Caller(identity, self._defaults if self._rules is None else self._rules.value.find(identity))

    def enter(self, caller: Caller, rpc: str, num_requests: int) -> None:
        """A call begins; `leave` must follow. Raises PermissionDenied or ClientLimit."""
        if caller.rules.rpcs is not None and rpc not in caller.rules.rpcs:
            raise PermissionDenied(f"this client may not call {rpc}")
        self._limits.enter(caller, num_requests)

    def leave(self, caller: Caller) -> None:
        """The call has ended."""
        self._limits.leave(caller)


def check_address(host: str, settings: SecuritySettings) -> None:
    """Raises StartupError where prompts and keys would cross a network in plain text without anyone having said so."""
    if not (settings.tls_cert or settings.insecure or _is_loopback(host)):
        raise StartupError(
            f"--host {host}: others could read and send everything, since the port is plain text; give --tls-cert and "
            "--tls-key, or --insecure where something else protects it"
        )


def check_admin_address(host: str, settings: SecuritySettings) -> None:
    """The same for the admin port, which has no TLS."""
    if not (settings.insecure or _is_loopback(host)):
        raise StartupError(
            f"--admin-host {host}: the admin port is plain text, and asks for no credentials; give --insecure where "
            "something else protects it"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(settings: SecuritySettings) -> None:
    for option in fields(settings):
        if getattr(settings, option.name) == "":  # a variable that somebody forgot to fill must not open the service
            raise StartupError(f"--{option.name.replace('_', '-')} is empty")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise StartupError("--tls-cert and --tls-key belong together")
    if settings.tls_client_ca and not settings.tls_cert:
        raise StartupError("--tls-client-ca needs --tls-cert and --tls-key")
    if not bool(settings.jwks) == bool(settings.jwt_issuer) == bool(settings.jwt_audience):
        raise StartupError("--jwks, --jwt-issuer and --jwt-audience belong together")


def _certificates(settings: SecuritySettings) -> Certificates | None:
    if not settings.tls_cert:
        return None
    from parleyd.security.tls import Certificates

    return Certificates(settings)


def _keys(settings: SecuritySettings, rpcs: Sequence[str], defaults: Rules) -> Watched[ApiKeys] | None:
    if not (path := settings.api_keys):
        return None
    from parleyd.security.api_keys import ApiKeys

    return Watched([path], lambda: ApiKeys.read(path, rpcs, defaults))


def _tokens(settings: SecuritySettings) -> Watched[Tokens] | None:
    path, issuer, audience = settings.jwks, settings.jwt_issuer, settings.jwt_audience
    if not (path and issuer and audience):
        return None
    from parleyd.security.tokens import Tokens

    return Watched([path], lambda: Tokens.read(path, issuer, audience))


def _client_rules(settings: SecuritySettings, rpcs: Sequence[str], defaults: Rules) -> Watched[ClientRules] | None:
    if not (path := settings.client_rules):
        return None
    from parleyd.security.client_rules import ClientRules

    return Watched([path], lambda: ClientRules.read(path, rpcs, defaults))


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What follows `Bearer` in the one `authorization` of a call."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1:
        raise Unauthenticated("no authorization" if not values else "several authorizations")
    scheme, _, credential = str(values[0]).partition(" ")
    if scheme.lower() != "bearer" or not 0 < len(credential) <= _MAX_CREDENTIAL_CHARS:
        raise Unauthenticated("authorization is not Bearer and a credential of acceptable length")
    return credential
