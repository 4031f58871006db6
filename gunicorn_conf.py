# SPDX-License-Identifier: Apache-2.0
"""`gunicorn -c gunicorn_conf.py` starts the service: settings in Gunicorn's words, hooks by name."""

import os

from service import hooks, logging
from service.settings import load_or_exit

settings = load_or_exit()

wsgi_app = "service.preload:application()"
worker_class = "service.worker.FleetWorker"
preload_app = True
reuse_port = False  # it would send connections to cold workers
max_requests = 0  # recycling by count would throw warm models away
workers = settings.first_workers
bind = [settings.bind, settings.ops_bind]

timeout = settings.heartbeat_timeout
graceful_timeout = settings.graceful_timeout
keepalive = settings.keepalive
shm = "/dev/shm"  # noqa: S108 - the heartbeat must not wait for a disk
worker_tmp_dir = shm if os.access(shm, os.W_OK) else None
control_socket_disable = True  # whoever has the uid could stop the service through it
logconfig_dict = logging.config(settings.log_format, settings.log_level)

nworkers_changed = hooks.nworkers_changed
on_starting = hooks.on_starting
when_ready = hooks.when_ready
pre_fork = hooks.pre_fork
post_fork = hooks.post_fork
post_worker_init = hooks.post_worker_init
child_exit = hooks.child_exit
on_exit = hooks.on_exit
