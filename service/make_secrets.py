"""Make the users of docker-compose.yml, each with a new password, in a folder 'secrets'."""

import base64
import hashlib
import json
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"
USERS = {  # what each may configure, write and read: the least that its script needs
    "worker": {"configure": "^$", "write": "^amq\\.default$", "read": "^tasks$"},
    "producer": {"configure": "^$", "write": "^amq\\.default$", "read": "^$"},
}


def main():
    try:
        FOLDER.mkdir(mode=0o700)  # nobody else on this computer may look into it
    except FileExistsError:
        sys.exit(f" [!] {FOLDER} is there already")
    users, permissions = [], []
    for name, allowed in USERS.items():
        password = secrets.token_urlsafe(24)
        # The script's secret is an address with the password. RabbitMQ gets only a hash of it.
        write(name, f"amqp://{name}:{password}@rabbitmq:5672/%2F\n")
        users.append({"name": name, "password_hash": hashed(password), "tags": []})
        permissions.append({"user": name, "vhost": "/", **allowed})
    definitions = {"users": users, "permissions": permissions}
    write("users.json", json.dumps(definitions, indent=2) + "\n")


def write(name, text):
    (FOLDER / name).write_text(text)
    # The users of the containers must be able to read it. The folder keeps everybody else out.
    (FOLDER / name).chmod(0o644)


def hashed(password):
    """Return the hash of a password, as RabbitMQ stores it."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


if __name__ == "__main__":
    main()
