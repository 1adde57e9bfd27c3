-- Gives slots back. KEYS: the leases. ARGV: their IDs, of which unpack would take some thousands at most.
local freed = 0
for i = 1, #ARGV do
	freed = freed + redis.call('ZREM', KEYS[1], ARGV[i])
end
return freed
