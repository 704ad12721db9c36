"""SSH to a board: commands, port forwards and resumable files that never hang on a dead link.

    with Shell.connect("10.0.0.7", 22, "root", Path("key"), Path("known_hosts")) as shell:
        print(shell.run(["uname", "-m"], timeout_s=10).stdout)
        put(shell, Path("model.gguf"), "/opt/model.gguf", stall_s=30)

Host keys are pinned, keys only. Every call has a time limit; when the link dies under one, the connection is torn down
and the call raises. `Upload` and `Download` survive loss of signal and power cuts: they resume where what is there is
proven good.
"""

from hil.drivers.ssh.connection import HostKey, Login, ShellLost, ShellTimeout, dial, host_key, pin, pinned
from hil.drivers.ssh.detached import Detached
from hil.drivers.ssh.download import Download, get
from hil.drivers.ssh.files import Upload, put
from hil.drivers.ssh.sftp import SftpError
from hil.drivers.ssh.shell import Process, Shell
from hil.drivers.ssh.transfer import Attempt

__all__ = [
    "Attempt",
    "Detached",
    "Download",
    "HostKey",
    "Login",
    "Process",
    "SftpError",
    "Shell",
    "ShellLost",
    "ShellTimeout",
    "Upload",
    "dial",
    "get",
    "host_key",
    "pin",
    "pinned",
    "put",
]
