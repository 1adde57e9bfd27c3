-- Makes leases last from now on, also those that Redis has lost meanwhile.
--
-- KEYS: the leases. ARGV: how long they last in µs, their IDs.
local time = redis.call('TIME')
local till = time[1] * 1000000 + time[2] + tonumber(ARGV[1])
for i = 2, #ARGV do
	redis.call('ZADD', KEYS[1], till, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1]) / 1000))
return #ARGV - 1
