// What Python calls: a function over pointers and numbers as one of its built-in functions, which costs a tenth of the
// microseconds of a call through ctypes. The few names of Python's stable interface are declared here, since its headers
// may not be installed; the process that loads the library has them. `rlhf.kernels.native.function` finds the other end.
// A function may throw: a std::invalid_argument arrives as ValueError, want of memory as MemoryError. No exception leaves
// a region of several threads, which would end the process: `Memory` carries it out.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

struct _object;
extern "C" {
typedef struct _object PyObject;
typedef PyObject* (*FastCall)(PyObject*, PyObject* const*, intptr_t);
struct PyMethodDef {
  const char* name;
  FastCall call;
  int flags;
  const char* doc;
};
extern PyObject _Py_NoneStruct;
extern PyObject* PyExc_TypeError;
extern PyObject* PyExc_ValueError;
extern PyObject* PyExc_MemoryError;
extern PyObject* PyExc_RuntimeError;
unsigned long long PyLong_AsUnsignedLongLongMask(PyObject*);
double PyFloat_AsDouble(PyObject*);
void Py_IncRef(PyObject*);
PyObject* PyErr_Occurred(void);
void PyErr_Clear(void);
PyObject* PyObject_Type(PyObject*);
void Py_DecRef(PyObject*);
PyObject* PyErr_Format(PyObject*, const char*, ...);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
}

namespace {

constexpr int kFastCall = 0x80;  // Python's METH_FASTCALL

// Whether all that threads wanted was there.
class Memory {
 public:
  // Does `work`, unless memory was wanting before.
  template <typename Function>
  void with(Function work) {
    if (wanting_) return;
    try {
      work();
    } catch (const std::bad_alloc&) {
      wanting_ = true;
    } catch (const std::length_error&) {  // of a vector, more than there can be
      wanting_ = true;
    }
  }
  bool wanting() const { return wanting_; }
  void check() const {
    if (wanting_) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> wanting_{false};
};

// A pointer from an address or None, a number from a number; otherwise an error is set.
template <typename T>
inline T converted(PyObject* x) {
  if constexpr (std::is_pointer_v<T>)
    return x == &_Py_NoneStruct ? nullptr : reinterpret_cast<T>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLongMask(x)));
  else if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(PyFloat_AsDouble(x));
  else
    return static_cast<T>(PyLong_AsUnsignedLongLongMask(x));
}

template <auto function>
struct Builtin;

template <typename... Arguments, void (*function)(Arguments...)>
struct Builtin<function> {
  static PyObject* call(PyObject*, PyObject* const* given, intptr_t count) {
    if (count != sizeof...(Arguments))
      return PyErr_Format(PyExc_TypeError, "%d arguments wanted, %d given", int(sizeof...(Arguments)), int(count));
    return call(given, std::index_sequence_for<Arguments...>());
  }

  template <size_t... i>
  static PyObject* call(PyObject* const* given, std::index_sequence<i...>) {
    const std::tuple<Arguments...> arguments{converted<Arguments>(given[i])...};
    if (PyErr_Occurred()) return refuse(given, std::index_sequence<i...>());
    std::exception_ptr thrown;
    void* const thread = PyEval_SaveThread();  // others may run Python meanwhile
    try {
      function(std::get<i>(arguments)...);
    } catch (...) {
      thrown = std::current_exception();
    }
    PyEval_RestoreThread(thread);
    if (thrown) return raise(thrown);
    Py_IncRef(&_Py_NoneStruct);
    return &_Py_NoneStruct;
  }

  static PyObject* raise(std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
      return PyErr_Format(PyExc_MemoryError, "a function in C++ wanted more memory than there is");
    } catch (const std::length_error&) {
      return PyErr_Format(PyExc_MemoryError, "a function in C++ wanted more memory than there can be");
    } catch (const std::invalid_argument& error) {
      return PyErr_Format(PyExc_ValueError, "%s", error.what());
    } catch (const std::exception& error) {
      return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
    }
  }

  // Names the first argument, counted from 0, that is no number.
  template <size_t... i>
  static PyObject* refuse(PyObject* const* given, std::index_sequence<i...>) {
    PyErr_Clear();
    size_t wrong = 0;
    ((converted<Arguments>(given[i]), !PyErr_Occurred() && ++wrong) && ...);
    PyErr_Clear();
    PyObject* const type = PyObject_Type(given[wrong]);
    PyErr_Format(PyExc_TypeError, "argument %d must be a number, or for an address None, not %S", int(wrong), type);
    Py_DecRef(type);
    return nullptr;
  }
};

}  // namespace

#define BUILTIN(function) \
  extern "C" {            \
  PyMethodDef function##_method = {#function, Builtin<function>::call, kFastCall, nullptr}; \
  }
