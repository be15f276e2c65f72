"""A gRPC server kit on grpclib that works around what grpclib 0.4.9 lacks."""
