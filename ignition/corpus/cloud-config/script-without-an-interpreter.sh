#!
echo "which shell? $BASH"
