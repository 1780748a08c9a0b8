-- HAProxy filter: lets only well-formed requests for the ensembles through to Triton.
--
-- The name of the model is in the body of a gRPC request and not in its path, so that a proxy which looks at paths cannot
-- keep clients from the ensemble's inner models. This filter parses the protobuf message while it streams through, and
-- holds back the part in which something is wrong, so that Triton never receives the whole message. Refused are: another
-- model, also as a second model name (the last one would count); parameters of inputs and outputs, with which Triton
-- shares memory or answers with text classifications; unknown fields; compression; a second message; too many bytes.
--
-- Messages: ModelInferRequest, ModelMetadataRequest, ModelConfigRequest of KServe's inference protocol (grpc_service.proto).
-- Arguments of the filter: the ensemble's name, and the largest message in bytes. Where a server holds several models, the
-- further ensembles have that name too, with a hyphen and a suffix.

local SMALL = 4096 -- bytes of a field that is looked into; tensors are not

local PREFIX = "/inference.GRPCInferenceService/"
local METHODS = { -- fields that may occur: "model" must be an ensemble, "skip" is not looked at, numbers limit fields
    ServerLive = {}, ServerReady = {}, ServerMetadata = {},
    ModelReady = { [1] = "model", [2] = "small" },
    ModelMetadata = { [1] = "model", [2] = "small" },
    ModelConfig = { [1] = "model", [2] = "small" },
    ModelInfer = {
        [1] = "model", [2] = "small", [3] = "small", [4] = "small",
        [5] = { [1] = true, [2] = true, [3] = true }, -- name, data type, shape
        [6] = { [1] = true }, -- name
        [7] = "skip",
    },
}

-- A base-128 number at a position; nil if the text ends within it.
local function varint(text, position)
    local value, shift = 0, 0
    while true do
        local byte = text:byte(position)
        if not byte then return nil end
        value = value | ((byte & 0x7f) << shift)
        position, shift = position + 1, shift + 7
        if byte < 0x80 then return value, position end
        if shift > 35 then return -1, position end -- no field number or length is that long
    end
end

-- Whether a nested message has only the allowed fields.
local function only(text, allowed)
    local position = 1
    while position <= #text do
        local tag, length
        tag, position = varint(text, position)
        if not tag or not allowed[tag >> 3] then return false end
        length, position = varint(text, position) -- a number, or the length of text or of packed numbers
        if not length or length < 0 then return false end
        if tag & 7 == 2 then position = position + length
        elseif tag & 7 ~= 0 then return false end
    end
    return position == #text + 1
end

local Guard = { id = "grpc_guard", flags = filter.FLT_CFG_FL_HTX }

function Guard:new()
    return setmetatable({ text = "", skip = 0 }, { __index = self })
end

function Guard:start_analyze(txn, channel)
    if not channel:is_resp() then
        local path = txn.sf:path() or ""
        self.fields = path:sub(1, #PREFIX) == PREFIX and METHODS[path:sub(#PREFIX + 1)] or {}
        filter.register_data_filter(self, channel)
    end
end

-- Parse what has arrived. True while nothing is wrong.
function Guard:accept(data)
    if self.skip >= #data then
        self.skip = self.skip - #data
        return true
    end
    self.text = self.text .. data:sub(self.skip + 1)
    self.skip = 0
    if not self.left then
        if #self.text < 5 then return true end
        local compressed, length = string.unpack(">I1I4", self.text)
        if compressed ~= 0 or length > self.limit then return false end
        self.left, self.text = length, self.text:sub(6)
    end
    while #self.text > 0 do
        local tag, position = varint(self.text, 1)
        if not tag then return #self.text < SMALL end
        local kind = self.fields[tag >> 3]
        if not kind or tag & 7 ~= 2 then return false end
        local length, start = varint(self.text, position)
        if not length then return #self.text < SMALL end
        local size = start - 1 + length
        if length < 0 or size > self.left then return false end
        if kind == "skip" then
            self.left = self.left - size
            if size > #self.text then
                self.skip, self.text = size - #self.text, ""
                return true
            end
        else
            if length > SMALL then return false end
            if size > #self.text then return true end -- the rest of the field has yet to come
            local value = self.text:sub(start, size)
            if kind == "model" and value ~= self.model and value:sub(1, #self.model + 1) ~= self.model .. "-" then
                return false
            end
            if type(kind) == "table" and not only(value, kind) then return false end
            self.left = self.left - size
        end
        self.text = self.text:sub(size + 1)
    end
    return true
end

function Guard:http_payload(txn, message)
    local data = message:body(0)
    if data and not self:accept(data) then
        error("request refused", 0) -- ends the request; HAProxy 2.6 forwards the data if filter.ERROR is returned
    end
end

core.register_filter("grpc_guard", Guard, function(class, arguments)
    class.model, class.limit = arguments[1], tonumber(arguments[2])
    return class
end)
