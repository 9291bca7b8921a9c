// From Python's mapping to a struct of arguments (NAPO_FIELDS of kernels.h): by name, and what is unknown, missing or
// of another type is a ValueError. The module knows nothing of torch's C++: a tensor is an object with data_ptr() and
// dtype, so one build serves every version.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace napo::border {

namespace py = pybind11;

// ---- fields --------------------------------------------------------------------------------------------------------

// The names of a struct's fields, interned; they live as long as the process.
template <class Args>
const std::vector<PyObject*>& names_of() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> all;
    Args{}.visit_fields([&](const char* list, auto&...) {
      for (const char* begin = list; *begin != '\0';) {
        const char* end = begin;
        while (*end != ',' && *end != '\0') ++end;
        all.push_back(PyUnicode_InternFromString(std::string(begin, end).c_str()));
        begin = *end == '\0' ? end : end + 2;  // ", "
      }
    });
    return all;
  }();
  return names;
}

struct Anything {
  template <class T>
  operator T() const;
};
template <class Args, size_t... i>
auto takes(std::index_sequence<i...>) -> decltype(Args{(static_cast<void>(i), Anything{})...}, std::true_type{});
template <class Args>
std::false_type takes(...);
// As many as initialisers are taken; an array takes one for each of its elements.
template <class Args, size_t n = 1>
constexpr size_t count_fields() {
  if constexpr (decltype(takes<Args>(std::make_index_sequence<n + 1>{}))::value) {
    return count_fields<Args, n + 1>();
  } else {
    return n;
  }
}
struct CountNamed {
  template <class... Fields>
  constexpr auto operator()(const char*, Fields&...) const {
    return std::integral_constant<size_t, (0 + ... + (std::is_array_v<Fields> ? std::extent_v<Fields> : 1))>{};
  }
};
template <class Args>
constexpr size_t kNamed = decltype(std::declval<Args>().visit_fields(CountNamed{}))::value;

template <class T, class = void>
constexpr bool kIsStruct = false;
template <class T>
constexpr bool kIsStruct<T, std::void_t<decltype(T::kName)>> = true;

template <class T>
constexpr bool kIsTensor = false;
template <int n>
constexpr bool kIsTensor<Tensor<n>> = true;

// ---- values --------------------------------------------------------------------------------------------------------

struct Place {
  const char* function;
  PyObject* field;
};

[[noreturn]] inline void refuse(const Place& at, const char* expected, PyObject* got) {
  PyErr_Clear();
  fail("%s: %s: expected %s, got %.200s", at.function, PyUnicode_AsUTF8(at.field), expected,
       std::string(py::repr(got)).c_str());
}

// An attribute of torch that is looked up once.
inline PyObject* torch_object(const char* name) {
  return py::object(py::module_::import("torch").attr(name)).release().ptr();
}

// Null with Python's error set where it has none.
inline py::object dtype_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("dtype");
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
}

// Null for a tensor without elements alone: a kernel takes null for None.
inline void* address_of(const Place& at, PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  static PyObject* const size = PyUnicode_InternFromString("numel");
  const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  void* result = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
  if (PyErr_Occurred() != nullptr) refuse(at, "a tensor", tensor);
  if (result != nullptr) return result;
  const auto elements = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, size));
  const bool has_elements = elements && PyObject_IsTrue(elements.ptr()) == 1;
  if (PyErr_Occurred() != nullptr) refuse(at, "a tensor", tensor);
  NAPO_CHECK(!has_elements, "%s: %s: expected a tensor with memory, got one without, such as a meta tensor",
             at.function, PyUnicode_AsUTF8(at.field));
  return nullptr;
}

template <class T>
bool is_of(PyObject* dtype) {
  const auto is = [dtype](PyObject* wanted) { return dtype == wanted; };
  if constexpr (std::is_same_v<T, float>) {
    static PyObject* const f32 = torch_object("float32");
    return is(f32);
  } else if constexpr (std::is_same_v<T, double>) {
    static PyObject* const f64 = torch_object("float64");
    return is(f64);
  } else if constexpr (std::is_same_v<T, int64_t>) {
    static PyObject* const i64 = torch_object("int64");
    return is(i64);
  } else if constexpr (std::is_same_v<T, int32_t>) {
    static PyObject* const i32 = torch_object("int32");
    return is(i32);
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    static PyObject* const boolean = torch_object("bool");
    static PyObject* const u8 = torch_object("uint8");
    return is(boolean) || is(u8);
  } else {
    static_assert(std::is_void_v<T>, "a pointer of this type has no dtype");
    return true;  // another field says which
  }
}
template <class T>
constexpr const char* kTensorOf = std::is_same_v<T, float>     ? "None or a tensor of float32"
                                  : std::is_same_v<T, double>  ? "None or a tensor of float64"
                                  : std::is_same_v<T, int64_t> ? "None or a tensor of int64"
                                  : std::is_same_v<T, int32_t> ? "None or a tensor of int32"
                                                               : "None or a tensor of bool or uint8";

template <class Args>
void fill(Args& args, const char* function, PyObject* from);

inline void read(int64_t& out, const Place& at, PyObject* value) {
  if (!PyLong_Check(value)) refuse(at, "an int", value);
  out = PyLong_AsLongLong(value);
  if (out == -1 && PyErr_Occurred() != nullptr) refuse(at, "an int of 64 bits", value);
}

inline void read(float& out, const Place& at, PyObject* value) {
  if (!PyFloat_Check(value) && !PyLong_Check(value)) refuse(at, "a number", value);
  out = static_cast<float>(PyFloat_AsDouble(value));
}

inline void read(bool& out, const Place& at, PyObject* value) {
  if (!PyBool_Check(value)) refuse(at, "a bool", value);
  out = value == Py_True;
}

inline void read(DType& out, const Place& at, PyObject* value) {
  static PyObject* const kinds[] = {torch_object("float32"), torch_object("bfloat16"), torch_object("float16")};
  for (int i = 0; i < 3; ++i) {
    out = static_cast<DType>(i);
    if (value == kinds[i]) return;
  }
  refuse(at, "torch.float32, torch.bfloat16 or torch.float16", value);
}

template <size_t n>
void read(int64_t (&out)[n], const Place& at, PyObject* value) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != static_cast<Py_ssize_t>(n)) refuse(at, "a tuple", value);
  for (size_t i = 0; i < n; ++i) read(out[i], at, PyTuple_GET_ITEM(value, i));
}

template <class T>
void read(T*& out, const Place& at, PyObject* value) {
  out = nullptr;
  if (value == Py_None) return;
  using Element = std::remove_const_t<T>;
  if constexpr (!std::is_void_v<Element>) {
    const py::object dtype = dtype_of(value);
    if (!dtype) refuse(at, kTensorOf<Element>, value);
    if (!is_of<Element>(dtype.ptr())) refuse(at, kTensorOf<Element>, dtype.ptr());
  }
  out = static_cast<T*>(address_of(at, value));
}

// An attribute of a tensor, or what its method of that name gives: a tuple of n ints.
template <size_t n>
void read_tuple(int64_t (&out)[n], const Place& at, py::object tuple, PyObject* tensor) {
  const bool fits = tuple && PyTuple_Check(tuple.ptr()) && PyTuple_GET_SIZE(tuple.ptr()) == static_cast<Py_ssize_t>(n);
  if (!fits) refuse(at, ("a tensor of " + std::to_string(n) + " dimensions").c_str(), tensor);
  read(out, at, tuple.ptr());
}

template <int n>
void read(Tensor<n>& out, const Place& at, PyObject* value) {
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  out = {};
  if (value == Py_None) return;
  read_tuple(out.size, at, py::reinterpret_steal<py::object>(PyObject_GetAttr(value, shape)), value);
  read_tuple(out.stride, at, py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, stride)), value);
  NAPO_CHECK(out.size[n - 1] <= 1 || out.stride[n - 1] == 1,
             "%s: %s: expected stride 1 in the last dimension, got %lld", at.function, PyUnicode_AsUTF8(at.field),
             static_cast<long long>(out.stride[n - 1]));
  const py::object dtype = dtype_of(value);
  if (!dtype) refuse(at, "a tensor", value);
  read(out.dtype, at, dtype.ptr());
  out.data = address_of(at, value);
}

template <class T, class = std::enable_if_t<kIsStruct<T>>>
void read(T& out, const Place& at, PyObject* value) {
  fill(out, at.function, value);
}

// ---- structs -------------------------------------------------------------------------------------------------------

template <class T, class = void>
constexpr bool kChecks = false;
template <class T>
constexpr bool kChecks<T, std::void_t<decltype(std::declval<const T&>().check())>> = true;

// A dict, or a NamedTuple with the same fields.
template <class Args>
void fill(Args& args, const char* function, PyObject* from) {
  static_assert(kNamed<Args> == count_fields<Args>(), "NAPO_FIELDS leaves a field out");
  const std::vector<PyObject*>& names = names_of<Args>();
  const bool is_dict = PyDict_Check(from);
  NAPO_CHECK(is_dict || PyTuple_Check(from), "%s: %s: expected a dict or a NamedTuple, got %s", function, Args::kName,
             Py_TYPE(from)->tp_name);
  size_t next = 0;
  const auto one = [&](auto& field) {
    PyObject* name = names[next++];
    py::object owned;
    PyObject* value = is_dict ? PyDict_GetItemWithError(from, name) : PyObject_GetAttr(from, name);
    if (!is_dict) owned = py::reinterpret_steal<py::object>(value);
    if (value == nullptr) {
      PyErr_Clear();
      fail("%s: %s of %s is missing", function, PyUnicode_AsUTF8(name), Args::kName);
    }
    read(field, {function, name}, value);
  };
  args.visit_fields([&](const char*, auto&... fields) { (one(fields), ...); });
  const Py_ssize_t size = is_dict ? PyDict_GET_SIZE(from) : PyTuple_GET_SIZE(from);
  if (size != static_cast<Py_ssize_t>(names.size())) {
    const py::list given(is_dict ? py::reinterpret_borrow<py::object>(from) : py::handle(from).attr("_fields"));
    for (const py::handle name : given) {
      bool known = false;
      for (PyObject* field : names) known = known || name.equal(py::handle(field));
      if (!known) fail("%s: %s has no %.80s", function, Args::kName, std::string(py::str(name)).c_str());
    }
  }
  if constexpr (kChecks<Args>) args.check();
}

// ---- what the stub says --------------------------------------------------------------------------------------------

template <class T>
py::object type_of(py::dict structs) {
  if constexpr (kIsStruct<T>) {
    if (!structs.contains(T::kName)) {
      py::dict fields;
      size_t next = 0;
      T{}.visit_fields([&](const char*, auto&... field) {
        ((fields[py::handle(names_of<T>()[next++])] = type_of<std::remove_reference_t<decltype(field)>>(structs)), ...);
      });
      structs[T::kName] = fields;  // behind those that it holds
    }
    return py::str(T::kName);
  } else {
    return py::str(std::is_pointer_v<T>         ? "Tensor | None"
                   : kIsTensor<T>               ? "Tensor | None"
                   : std::is_same_v<T, DType>   ? "torch.dtype"
                   : std::is_same_v<T, bool>    ? "bool"
                   : std::is_same_v<T, float>   ? "float"
                   : std::is_same_v<T, int64_t> ? "int"
                                                : "tuple[int, int, int]");
  }
}

}  // namespace napo::border
