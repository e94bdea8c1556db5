"""Transport security whose certificates may be replaced while it serves."""

import logging
import threading

import grpc

from adapters.identity.certificates import CertificateFault, CertificateFiles, Certificates, read

_log = logging.getLogger(__name__)


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """TLS with these files; with a client CA, clients need a certificate of it. Raises CertificateFault.

    Each new connection sees what the files hold then; connections that are open stay as they are. Files that don't
    fit together, as while they are being replaced, change nothing.
    """
    reloaded = Reloaded(files)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(reloaded.held),
        reloaded.fetch,  # type: ignore[arg-type] # None: nothing new
        require_client_authentication=files.client_ca is not None,
    )


class Reloaded:
    """The certificates of some files, read anew when one of them changes. For any thread."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self.held: Certificates = read(files)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What new connections are to see from now on; None if that has not changed."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            self._stamp = stamp  # of before the reading: what changes meanwhile is read again
            try:
                self.held = read(self._files)
            except CertificateFault as fault:
                _log.warning("new certificates are not taken yet: the %s %s", fault.part, fault)
                return None
            _log.info("new certificates, valid until %s", self.held.valid_until.isoformat())
            return _configuration(self.held)


def _configuration(held: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(held.key, held.certificate)], held.client_ca)
