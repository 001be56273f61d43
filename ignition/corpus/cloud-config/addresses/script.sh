#!/bin/sh
# private_ipv4: 10.0.0.2
echo "$private_ipv4 and \$public_ipv4" > /etc/where
