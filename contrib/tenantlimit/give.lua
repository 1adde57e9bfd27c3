-- Gives slots back. KEYS: the leases. ARGV: their IDs.
return redis.call('ZREM', KEYS[1], unpack(ARGV))
