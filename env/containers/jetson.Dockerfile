# dinfer for a Jetson board: engines that `dinfer profile ssh BOARD:2222` starts. The guide's page "Several hosts" has the
# commands. BASE: an image with a torch built for the board and its JetPack, on Python 3.11 or newer, such as
# jetson-containers builds; the image's own torch is kept.
ARG BASE
FROM $BASE

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv openssh-server iproute2 \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && mkdir -p /run/sshd

RUN python3 -c "import sys, torch; \
version = tuple(int(part) for part in torch.__version__.split('.')[:2]); \
sys.exit(None if sys.version_info >= (3, 11) and version >= (2, 11) and torch.version.cuda else \
f'BASE has Python {sys.version.split()[0]} and torch {torch.__version__} (CUDA {torch.version.cuda}); dinfer needs \
Python 3.11, and torch 2.11 with CUDA, or newer: give another --build-arg BASE')"

WORKDIR /opt/dinfer
COPY LICENSE README.md pyproject.toml ./
COPY env/constraints.txt env/constraints.txt
COPY env/docs/readme.py env/docs/readme.py
COPY dinfer dinfer
RUN python3 -m venv --system-site-packages .venv \
    && grep -vE '^(torch|triton|nvidia|numpy)' env/constraints.txt > /tmp/constraints.txt \
    && .venv/bin/pip install --no-cache-dir -c /tmp/constraints.txt .

EXPOSE 2222
CMD ["sh", "-c", "ssh-keygen -A && exec /usr/sbin/sshd -D -e -p 2222 -o StrictModes=no -o PasswordAuthentication=no"]
