# dinfer for a host with NVIDIA GPUs: engines that `dinfer profile ssh HOST:2222` starts, or notebooks. The guide's page
# "Several hosts" has the commands. The base needs no CUDA of its own, since torch's wheels bring theirs; a base with
# another driver requirement: --build-arg BASE=…
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM $BASE

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev gcc openssh-server iproute2 \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && mkdir -p /run/sshd

WORKDIR /opt/dinfer
COPY LICENSE README.md pyproject.toml ./
COPY env/constraints.txt env/constraints.txt
COPY env/docs/readme.py env/docs/readme.py
COPY dinfer dinfer
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -c env/constraints.txt '.[lab]'

# Each container has host keys of its own. The user's public keys are mounted: their owner is another than root.
EXPOSE 2222
CMD ["sh", "-c", "ssh-keygen -A && exec /usr/sbin/sshd -D -e -p 2222 -o StrictModes=no -o PasswordAuthentication=no"]
