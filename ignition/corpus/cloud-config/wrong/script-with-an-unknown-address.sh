#!/bin/sh
# error: : is not known of this machine

echo $public_ipv6
