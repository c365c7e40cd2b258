"""The Redis scripts for leases: each is one change, made whole or not at all. Text only; `redis` runs them.

Each message has one hash, kept for the retention after its last change:

    status        0 consuming, 1 consumed          fingerprint   what two copies must have in common
    token         of the claim that stands         attempt       the number of that claim, from 1
    until         end of its lease, milliseconds   released      the token that was released, so that releasing is idempotent
    step:NAME     "ordinal finished attempt token" and, after a newline, the result

Time is that of Redis (TIME in the script; since Redis 5 the commands after it are replicated by their effect). If an answer is
lost and a script is sent again, it changes nothing more. Source: https://redis.io/docs/latest/develop/programmability/eval-intro/
"""

from typing import Final

__all__ = ["CLAIM", "COMPLETE", "LOOK", "RELEASE", "RENAME", "RENEW", "STEP"]

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

CLAIM: Final = f"""{_NOW}
-- KEYS: the message.  ARGV: token, lease in ms, retention in ms, fingerprint, another that counts as it
local known = redis.call('HMGET', KEYS[1], 'status', 'token', 'until', 'fingerprint')
local status, token, till, fingerprint = known[1], known[2], known[3], known[4]
local free = not status
if status == '0' and token ~= ARGV[1] then
  free = (token == '' or tonumber(till) <= now) and (fingerprint == ARGV[4] or fingerprint == ARGV[5])
end
if free then
  redis.call('HSET', KEYS[1], 'status', '0', 'token', ARGV[1], 'fingerprint', ARGV[4],
    'until', string.format('%.0f', now + ARGV[2]))
  redis.call('HINCRBY', KEYS[1], 'attempt', 1)
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {{now, redis.call('HGETALL', KEYS[1])}}
"""

COMPLETE: Final = """
-- KEYS: the message.  ARGV: token, retention in ms
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'status', '1')
redis.call('HDEL', KEYS[1], 'until')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

RELEASE: Final = """
-- KEYS: the message.  ARGV: token, retention in ms
local known = redis.call('HMGET', KEYS[1], 'status', 'token', 'released')
if known[3] == ARGV[1] then return 1 end
if known[1] ~= '0' or known[2] ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'token', '', 'released', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

RENEW: Final = f"""{_NOW}
-- KEYS: messages.  ARGV: lease in ms, retention in ms, then their tokens.  Returns the numbers of those that are lost
local lost = {{}}
for n, key in ipairs(KEYS) do
  local known = redis.call('HMGET', key, 'status', 'token')
  if known[1] == '0' and known[2] == ARGV[n + 2] then
    redis.call('HSET', key, 'until', string.format('%.0f', now + ARGV[1]))
    redis.call('PEXPIRE', key, ARGV[2])
  else
    lost[#lost + 1] = n
  end
end
return lost
"""

STEP: Final = """
-- KEYS: the message.  ARGV: token, retention in ms, field, value, 1 to write over another run's record
-- Returns 1 stored, 0 the lease is lost, 2 there is another run's record
local known = redis.call('HMGET', KEYS[1], 'status', 'token', ARGV[3])
if known[1] ~= '0' or known[2] ~= ARGV[1] then return 0 end
if known[3] and ARGV[5] ~= '1' then
  local finished, owner = string.match(known[3], '^%d+ (%d) %d+ (%S*)')
  if owner ~= ARGV[1] then return 2 end
  if finished == '1' then return 1 end
end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

LOOK: Final = f"""{_NOW}
return {{now, redis.call('HGETALL', KEYS[1])}}
"""

RENAME: Final = """
-- ARGV: where to go on, a pattern, the beginning of the old names, that of the new ones.  Returns where to go on, moved, left
local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 1000)
local moved, left = 0, 0
for _, key in ipairs(found[2]) do
  if redis.call('RENAMENX', key, ARGV[4] .. string.sub(key, #ARGV[3] + 1)) == 1 then
    moved = moved + 1
  else
    left = left + 1
  end
end
return {found[1], moved, left}
"""
