import { Button, Stack, Text } from '@mantine/core';
import { CopyText } from './CopyText';

interface Props {
  title: string;
  text: string; // what whoever has it can do
  secret: string;
  label: string;
  done: string;
  onDone: () => void;
}

/** A key or token that is shown this once. */
export function Secret({ title, text, secret, label, done, onDone }: Props) {
  return (
    <Stack>
      <Text fw={600}>{title}</Text>
      <CopyText text={secret} label={label} />
      <Text size="sm" c="dimmed">
        {text}
      </Text>
      <Button onClick={onDone}>{done}</Button>
    </Stack>
  );
}
