#!/usr/bin/env bash
# Make a user of RabbitMQ with a random password, and write its AMQP_URL to the file users/NAME.
# usage: ./add_user.sh NAME CONFIGURE WRITE READ     The last three are patterns: see the lesson.
set -euo pipefail
cd "$(dirname "$0")"
umask 077  # nobody else on this computer can read what we write
mkdir -p users

# A command line can be seen by everybody on this computer, so there is no password in it: echo is a
# part of bash, and starts no program. rabbitmqctl reads the password from its standard input.
password=$(openssl rand -hex 16)
echo "$password" | docker compose exec -T rabbitmq rabbitmqctl add_user "$1"
docker compose exec -T rabbitmq rabbitmqctl set_permissions "$1" "$2" "$3" "$4" </dev/null
echo "amqps://$1:$password@localhost:${RABBITMQ_TLS_PORT:-5671}" >"users/$1"
