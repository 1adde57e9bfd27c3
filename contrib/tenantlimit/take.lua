-- Decides one call on its rate and its concurrency: both let it pass and are counted, or neither is.
--
-- KEYS: the bucket, and the leases if there are slots. All in one slot of a Cluster.
-- ARGV: requests, period in µs, burst, cost; slots and, if there are any, the lease's ID and how long
--       it lasts in µs. No requests: no rate.
-- Returns what refused it (0 nothing, 1 rate, 2 concurrency), the tokens left, the slots taken.
--
-- A bucket is its tokens and when they were counted, two doubles. A missing one is full, so that a key
-- may expire when its bucket would be.
local requests, period, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local slots = tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local refused = 0

local tokens, mended = burst, false
if requests > 0 then
	local bucket = redis.call('GET', KEYS[1])
	if bucket then
		local was = now
		if #bucket == 16 then
			tokens, was = struct.unpack('<dd', bucket)
		else
			tokens = 0 / 0
		end
		-- The clock went back: the tokens stay, and flow in from now. That must be kept even if the call is
		-- refused, or none would flow in until the clock has caught up. So must what stands for nonsense.
		mended = was > now
		tokens = math.min(burst, tokens + math.max(0, now - was) * requests / period)
		if not (tokens >= 0) then
			tokens, mended = 0, true
		end
	end
	if tokens < cost then
		refused = 1
	end
end

local taken, hold = 0, 0
if slots > 0 then
	hold = tonumber(ARGV[7])
	redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
	-- A lease that ends later than one taken now would is from before the clock went back.
	for _, late in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], string.format('(%.0f', now + hold), '+inf')) do
		redis.call('ZADD', KEYS[2], now + hold, late)
	end
	taken = redis.call('ZCARD', KEYS[2])
	if taken >= slots and refused == 0 then
		refused = 2
	end
end

if refused == 0 then
	if requests > 0 then
		tokens = tokens - cost
		mended = true
	end
	if slots > 0 then
		taken = taken + redis.call('ZADD', KEYS[2], now + hold, ARGV[6])
		redis.call('PEXPIRE', KEYS[2], math.ceil(hold / 1000))
	end
end
if mended then
	local full = math.ceil((burst - tokens) * period / requests / 1000)
	redis.call('SET', KEYS[1], struct.pack('<dd', tokens, now), 'PX', string.format('%.0f', math.max(1, full)))
end
return { refused, string.format('%.17g', tokens), taken }
