-- For wrk: compares every body with a file, which is named behind `--`.
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  expected = file:read("*a")
  file:close()
  right, wrong = 0, 0
end

function response(status, headers, body)
  if status == 200 and body == expected then
    right = right + 1
  else
    wrong = wrong + 1
  end
end

function done(summary, latency, requests)
  local right, wrong = 0, 0
  for _, thread in ipairs(threads) do
    right, wrong = right + thread:get("right"), wrong + thread:get("wrong")
  end
  io.write(string.format("bodies: %d right, %d wrong\n", right, wrong))
end
