import { Icon } from '@/components/Icon';
import { ActionIcon, Textarea } from '@mantine/core';
import { useImperativeHandle, useRef, useState, type Ref } from 'react';
import { useTranslation } from 'react-i18next';
import css from './Composer.module.css';

export interface ComposerHandle {
  write: (text: string) => void;
}

interface Props {
  running: boolean;
  disabled: boolean;
  label: string;
  placeholder: string;
  draft: string; // what stands there at first
  onSend: (text: string) => void;
  onStop: () => void;
  ref?: Ref<ComposerHandle>;
}

/** Enter sends and shift-enter breaks the line; an input method that is composing a letter keeps its enter. */
export function Composer({ running, disabled, label, placeholder, draft, onSend, onStop, ref }: Props) {
  const { t } = useTranslation();
  const [text, setText] = useState(draft);
  const field = useRef<HTMLTextAreaElement>(null);
  useImperativeHandle(ref, () => ({
    write: (words) => {
      setText(words);
      field.current?.focus();
    },
  }));
  const send = () => {
    if (!text.trim() || disabled || running) return;
    onSend(text.trim());
    setText('');
  };
  return (
    <form
      className={css.composer}
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <Textarea
        ref={field}
        className={css.field}
        variant="unstyled"
        aria-label={label}
        placeholder={placeholder}
        value={text}
        onChange={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === 'Enter' && !event.shiftKey && !event.nativeEvent.isComposing) {
            event.preventDefault();
            send();
          }
        }}
        autosize
        minRows={1}
        maxRows={9}
        disabled={disabled}
      />
      {running ? (
        <ActionIcon
          className={css.button}
          size={38}
          radius="xl"
          variant="light"
          onClick={onStop}
          aria-label={t('generate.stop')}
        >
          <Icon name="stop" />
        </ActionIcon>
      ) : (
        <ActionIcon
          className={css.button}
          type="submit"
          size={38}
          radius="xl"
          disabled={disabled || !text.trim()}
          aria-label={t('generate.send')}
        >
          <Icon name="send" />
        </ActionIcon>
      )}
    </form>
  );
}
